"""CSD-VAR as a whole: from a text with learned tokens of content and of style to a picture, by four networks.

Source: Nguyen et al. 2025, arXiv:2507.13984; the order of things is that of the authors' drawing. Checked against
visual-ar-group/CSD-VAR at 37507e7 (pipeline.py): which text a scale reads, how guidance grows, what a scale gives to
the next. Early scales read the style's text and later ones the content's; what conditions the norms is the whole text.

Departures, so that a run tells what engines change and not what chance does: codes are the likeliest, not drawn among
the likely (``scales.keep_likely``); texts are random tokens around the learned ones. Weights are random: what is drawn
is no picture, and engines must draw the same.

Shapes: B batch, always 1; N tokens of all scales, R side of the map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from enginewright.ground.errors import ToolchainError
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Array, Arrays
from enginewright.models.diffusion.csd_var import quantizer, text, transformer
from enginewright.models.diffusion.csd_var.scales import STYLE_SCALES, Split, guided, starts
from enginewright.sources.jobs import Job

RUNS = 2
"""Pictures that engines are tried on."""
TEXTS = ("whole", "style", "content", "none")
"""The texts of one picture, a row each."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A size of the whole.

    Args:
        parts: for each part the model that it is.
        text: its configuration.
        transformer: its configuration.
        quantizer: its configuration.
    """

    parts: Mapping[str, str]
    text: text.Config
    transformer: transformer.Config
    quantizer: quantizer.Config


SIZES = {
    "tiny": Size(
        parts={
            "text": "csd_var-text:tiny",
            "transformer": "csd_var-transformer:tiny",
            "quantizer": "csd_var-quantizer:tiny",
            "decoder": "csd_var-decoder:tiny",
        },
        text=text.TINY,
        transformer=transformer.TINY,
        quantizer=quantizer.TINY,
    ),
    "512": Size(
        parts={
            "text": "csd_var-text:clip-l-bigg",
            "transformer": "csd_var-transformer:csd-var",
            "quantizer": "csd_var-quantizer:512",
            "decoder": "csd_var-decoder:512",
        },
        text=text.PUBLISHED["clip-l-bigg"],
        transformer=transformer.PUBLISHED["csd-var"],
        quantizer=quantizer.PUBLISHED["512"],
    ),
}


def job(size: str, *, prompts: Sequence[str], steps: int, arguments: Mapping[str, Any]) -> Job:
    """Pictures of random texts with learned tokens.

    Args:
        size: of ``SIZES``.
        prompts: must be none; there is no tokenizer.
        steps: not read; a picture takes a step for each scale.
        arguments: ``split``, which scales read the style's text (``scales.STYLE_SCALES``); without it, those of the
            authors' drawing.

    Raises:
        ToolchainError: it was given texts, or other arguments.
    """
    split = arguments.get("split", "released-drawing")
    if prompts or set(arguments) - {"split"} or split not in STYLE_SCALES:
        raise ToolchainError(
            "CSD-VAR's job takes no prompts, and of arguments only split", where="job", help=", ".join(STYLE_SCALES)
        )
    chosen = SIZES[size]
    return Job(
        parts=tuple(chosen.parts),
        calls=tuple({"number": np.array([i])} for i in range(RUNS)),
        assemble=lambda networks: drawing(networks, chosen, split),
        run=lambda draw: draw,
        models=chosen.parts,
        notes=(f"{RUNS} pictures of random texts, likeliest codes, style's text as in {split}",),
    )


def drawing(networks: Mapping[str, Runner], size: Size, split: Split = "released-drawing") -> Runner:
    """A runner of pictures: the number of one -> its codes (1, N) and its pixels (1, 3, y, x)."""

    def draw(inputs: Arrays) -> Arrays:
        texts = texts_of(size.text, int(inputs["number"][0]))
        ends = (texts["ids"] == size.text.end).argmax(axis=1, keepdims=True)
        mask = np.arange(size.text.text) <= ends  # tokens up to the first end mark are none of padding
        codes, map = draw_map(networks, size, {**networks["text"](texts), "mask": mask}, split)
        return {"codes": codes, **networks["decoder"]({"map": map})}

    return draw


def texts_of(config: text.Config, number: int) -> Arrays:
    """The call of the text encoders for one picture: a row for each of ``TEXTS``.

    All hold one random word; the learned tokens of the content follow it, those of the style, both, or none.
    """
    rng = np.random.default_rng(number)
    word, begin = rng.integers(0, config.end - 1), config.end - 1
    content, style = (list(range(config.vocabulary + 4 * i, config.vocabulary + 4 * i + 4)) for i in range(2))
    room = config.text - 3  # the word, and both marks
    ids = np.full((len(TEXTS), config.text), config.end)
    for row, own in enumerate((content[: room // 2] + style[: room - room // 2], style, content, [])):
        words = [begin, word, *own[:room]] if own else [begin]
        ids[row, : len(words)] = words
    return {"ids": ids, "ids_second": after_end(ids, config.end), "style": np.isin(ids, style)}


def after_end(ids: Array, end: int) -> Array:
    """The same ids (B, T) with zeros after the first end mark, as the second encoder's tokenizer pads."""
    passed = np.cumsum(ids == end, axis=1) > 1
    return np.where(passed, 0, ids)


def draw_map(
    networks: Mapping[str, Runner], size: Size, said: Mapping[str, Array], split: Split
) -> tuple[Array, Array]:
    """Draw all scales, the likeliest codes of each.

    Args:
        networks: the transformer and the quantizer.
        size: of both.
        said: what the text encoders gave for ``TEXTS``, and ``mask`` (4, T), true where a token is none of padding.
        split: which scales read the style's text; the others read the content's.

    Returns:
        Codes (1, N), and the map of what they stand for (1, C, R, R).
    """
    config, places = size.transformer, starts(size.transformer.scales)
    none = TEXTS.index("none")
    pooled = said["pooled"][[TEXTS.index("whole"), none]]
    crop = np.array([[512, 512, 0, 0]] * 2, np.float32)
    features: Array = np.zeros((1, 1, config.channels), np.float32)
    map: Array = np.zeros((1, config.channels, size.quantizer.side, size.quantizer.side), np.float32)
    found = []
    for scale, begin in enumerate(places[:-1]):
        read = TEXTS.index("style" if scale in STYLE_SCALES[split] else "content")
        call: Arrays = {
            "features": np.repeat(features, 2, axis=0),
            "position": np.asarray(begin, np.int64),
            "pooled": pooled,
            "crop": crop,
            "context": said["context"][[read, none]],
            "mask": said["mask"][[read, none]],
        }
        logits = torch.from_numpy(np.asarray(networks["transformer"](call)["logits"]))
        likely = guided(logits[:1], logits[1:], scale, scales=len(config.scales)).argmax(-1)
        found.append(likely.numpy())
        given = networks["quantizer"](quantizer.call_of(size.quantizer, found[-1], scale, map))
        map, features = (np.asarray(given[name]) for name in ("new_map", "features"))
    return np.concatenate(found, axis=1), map
