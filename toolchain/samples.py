"""What whole runs gave, for a reader of the report to look at: pictures as they are, sounds as mel spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
        caption = f"the first {min(SHOWN, count)} of {count} samples, from the same noise"
    elif isinstance(task, SpectraTask):
        spectra = {name: task.log_mel(each[:SHOWN_SOUNDS]) for name, each in drawn.items()}
        loudest = float(spectra["original"].max())
        pictures = {name: spectra_png(each, loudest=loudest) for name, each in spectra.items()}
        caption = (
            f"mel spectra of the first {min(SHOWN_SOUNDS, count)} of {count} sounds, from the same inputs: "
            f"{task.rate} samples a second, so bands up to {task.rate / 2:g} Hz, the lowest at the bottom; "
            f"white is the loudest of the original, black {SHADES_DB:g} dB below it"
        )
    else:
        return []
    return [
        record.Samples(target=name, original_png=pictures["original"], candidate_png=pictures[name], caption=caption)
        for name in engines
    ]
