"""What whole runs gave, for a reader of the report to look at: pictures as they are, sounds as mel spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from enginewright.ground.signature import Array
from enginewright.reports import record
from enginewright.reports.pictures import SHADES_DB, png_grid, spectra_png
from enginewright.validation.contract import SamplingTask, SpectraTask, Workload

SHOWN = 20
SHOWN_SOUNDS = 3
"""Samples that the report shows."""


def shown(task: Workload, drawn: Mapping[str, Any], engines: Sequence[str], count: int) -> list[record.Samples]:
    """The first of what each engine drew beside the original's; nothing where there is nothing to look at.

    Args:
        task: what they ran.
        drawn: what the original and each engine drew, as ``task.drawn`` gives it.
        engines: their names.
        count: how many samples each drew.
    """
    if isinstance(task, SamplingTask):
        pictures = {name: png_grid(each.pictures[:SHOWN]) for name, each in drawn.items()}
        return beside(pictures, engines, f"the first {min(SHOWN, count)} of {count} samples, from the same noise")
    if isinstance(task, SpectraTask):
        spectra = {name: task.log_mel(each[:SHOWN_SOUNDS]) for name, each in drawn.items()}
        return shown_spectra(spectra, engines, rate=task.rate, count=count)
    return []


def shown_spectra(
    spectra: Mapping[str, Array], engines: Sequence[str], *, rate: int, count: int
) -> list[record.Samples]:
    """Log-mel spectra of the first sounds that each engine gave beside the original's, on the original's scale.

    Args:
        spectra: of the original and of each engine (n, M, T), of at most ``SHOWN_SOUNDS``.
        engines: their names.
        rate: samples a second of the sounds.
        count: how many sounds each gave.
    """
    loudest = float(spectra["original"].max())
    caption = (
        f"mel spectra of the first {min(SHOWN_SOUNDS, count)} of {count} sounds, from the same inputs: "
        f"{rate} samples a second, so bands up to {rate / 2:g} Hz, the lowest at the bottom; "
        f"white is the loudest of the original, black {SHADES_DB:g} dB below it"
    )
    return beside({name: spectra_png(each, loudest=loudest) for name, each in spectra.items()}, engines, caption)


def beside(pictures: Mapping[str, str], engines: Sequence[str], caption: str) -> list[record.Samples]:
    """One picture of each engine beside the original's."""
    return [
        record.Samples(target=name, original_png=pictures["original"], candidate_png=pictures[name], caption=caption)
        for name in engines
    ]
