"""What a network of transformers takes: each argument of its ``forward`` becomes an input, or is left out for a reason.

There is no list of models here. An argument's name says what kind of input it is, the configuration how large. Where
that leaves a choice (are texts and pictures paired? does a sound have a channel?), ``variants`` gives every reading,
and the caller keeps the first that the network answers.

Shapes: B batch, N tokens, C channels, H height, W width, T samples or frames of sound, F frames of a film.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from enginewright.ground.errors import FaultsError, ToolchainError, unknown
from enginewright.ground.reading import read_json
from enginewright.ground.signature import Dim, InputSpec
from enginewright.sources.sizes import Limits, dim_of

LONGEST = 512
"""Tokens, where a model sets no limit or a larger one and nobody asks for more."""
SAMPLES = Limits(1_600, 16_000, 480_000)
"""Of sound at 16 kHz: a tenth of a second, a second, half a minute."""
FRAMES = Limits(16, 100, 3_000)
"""Of spectrograms, a hundred a second."""
PICTURE = 224
"""Height and width, where neither configuration nor preprocessor says one."""
CHARACTERS = 0x110000
"""Of Unicode, for models that read them in place of tokens."""

PARTS = ("text_config", "vision_config", "audio_config", "backbone_config", "encoder_config", "encoder", "decoder")
"""Configurations inside a configuration."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One way to read a configuration.

    Args:
        towers: texts, pictures and sounds each have a batch size of their own.
        picture: height and width.
        pictures_layout: which of the shapes that pictures can have.
        sound_layout: which of the shapes that sounds can have.
    """

    towers: bool = False
    picture: tuple[int, int] = (PICTURE, PICTURE)
    pictures_layout: int = 0
    sound_layout: int = 0


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a network before it is called.

    Args:
        module: the network; its weights are not read.
        config: its configuration.
        preprocessor: content of ``preprocessor_config.json``.
        asked: sizes that the user gave, by the name of a dimension.
        tokens: largest number of tokens that the folder's tokenizer is set to; None: not said.
        where: for errors.
    """

    module: nn.Module
    config: Any
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    asked: Mapping[str, Limits] = field(default_factory=dict)
    tokens: int | None = None
    where: str = ""

    @cached_property
    def known(self) -> Mapping[str, inspect.Parameter]:
        """The arguments of ``forward``."""
        return inspect.signature(self.module.forward).parameters

    def get(self, *names: str, part: str = "") -> Any:
        """The first of these settings that the configuration has, or a configuration inside it."""
        inner = getattr(self.config, part, None) if part else None
        for config in (inner, self.config, *(getattr(self.config, name, None) for name in PARTS)):
            for name in names:
                if config is not None and (value := getattr(config, name, None)) is not None:
                    return value
        return None

    @cached_property
    def positions(self) -> int | None:
        """Tokens that the model has learned positions for; None where it computes them."""
        found = []
        for name, part in self.module.named_modules():
            rows = getattr(part, "num_embeddings", None)
            if rows and re.search(r"(position_embeddings?|embed_positions|wpe|pos_embed|position_embed)$", name):
                if re.search(r"vision|visual|image|pixel|audio|decoder|[xyhw]_position|token_type", name):
                    continue
                offset = getattr(part, "offset", None)
                padding = getattr(part, "padding_idx", None)  # positions start behind the padding token's
                found.append(rows - (offset if isinstance(offset, int) else 0 if padding is None else padding + 1))
        return min(found, default=None)

    @cached_property
    def trained_positions(self) -> int | None:
        """Tokens that the model was made for, whether it could read more or not."""
        said = self.get("max_position_embeddings", "n_positions", "max_seq_len", part="text_config")
        limits = [n for n in (self.positions, said) if isinstance(n, int) and n > 0]
        return min(limits, default=None)

    @property
    def preprocessed(self) -> tuple[int, int] | None:
        """Height and width that the preprocessor brings pictures to; None: not said."""
        keys = ("size",) if self.preprocessor.get("do_center_crop") is False else ("crop_size", "size")
        return next(filter(None, (pair(self.preprocessor.get(key)) for key in keys)), None)

    @property
    def configured(self) -> tuple[int, int] | None:
        """Height and width that the configuration names; None: not said."""
        return pair(self.get("image_size", "crop_size", "input_size", part="vision_config"))

    def picture_sizes(self) -> list[tuple[int, int]]:
        """Height and width by the preprocessor, then by the configuration."""
        found = [self.preprocessed, self.configured]
        return list(dict.fromkeys(size for size in found if size)) or [(PICTURE, PICTURE)]

    def says_who(self, size: tuple[int, int]) -> str:
        """Where a size of pictures is from, in words."""
        if size == self.preprocessed:
            own = self.configured
            other = f" (config.json: {own[0]} x {own[1]})" if own and own != size else ""
            return f"as preprocessor_config.json has it{other}"
        return "as config.json has it" if size == self.configured else "because neither file of settings says a size"


def pair(size: Any) -> tuple[int, int] | None:
    """Height and width from the forms that a size has in configurations; None for others."""
    if isinstance(size, Mapping):
        short = size.get("shortest_edge", size.get("longest_edge"))
        size = (size.get("height", short), size.get("width", short))
    if isinstance(size, int) and not isinstance(size, bool):
        return size, size
    if isinstance(size, list | tuple) and len(size) >= 2 and all(isinstance(n, int) for n in size[-2:]):
        return size[-2], size[-1]
    return None


def preprocessor_of(folder: Path) -> dict[str, Any]:
    """Settings of the pictures and sounds that a folder's model wants; empty where no file has them."""
    found: dict[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        content = read_json(folder / name, what=name) if (folder / name).is_file() else None
        if isinstance(content, dict):
            inner = [content.get(key) for key in ("image_processor", "feature_extractor")]
            for part in (content, *inner):
                found |= part if isinstance(part, dict) else {}
    return found


def readings(facts: Facts) -> Iterator[Reading]:
    """Every way to read the configuration that is worth a call, the likeliest first."""
    kinds = [name for name in ("input_ids", "pixel_values", "input_features", "input_values") if name in facts.known]
    towers = (True, False) if len(kinds) > 1 else (False,)
    seen = {"pixel_values", "pixel_values_videos"} & {*facts.known}
    sizes = facts.picture_sizes() if seen else [(PICTURE, PICTURE)]
    pictures = range(len(picture_layouts(facts)) if "pixel_values" in kinds else 1)
    sounds = range(len(sound_layouts(facts)) if {"input_features", "input_values"} & {*kinds} else 1)
    for picture, size, sound, apart in itertools.product(pictures, sizes, sounds, towers):
        yield Reading(towers=apart, picture=size, pictures_layout=picture, sound_layout=sound)


def picture_layouts(facts: Facts) -> list[str]:
    """The order of axes that pictures can have."""
    return ["BFCHW", "BCHW"] if facts.get("num_frames") else ["BCHW", "BFCHW"]


def sound_layouts(facts: Facts) -> list[tuple[Dim | int, ...]]:
    """The shapes that sounds can have behind the batch."""
    if "input_values" in facts.known and "input_features" not in facts.known:
        length, bins = facts.get("max_length"), facts.get("num_mel_bins")
        if isinstance(length, int) and isinstance(bins, int):
            return [(length, bins)]
        samples = Dim(name="samples", **SAMPLES._asdict())
        return [(samples,), (facts.get("audio_channels") or 1, samples)]
    frames = Dim(name="frames", **FRAMES._asdict())
    bins = facts.get("num_mel_bins", "input_feat_per_channel", part="audio_config")
    found: list[tuple[Dim | int, ...]] = []
    if bins and (half := facts.get("max_source_positions", part="audio_config")):
        found.append((bins, 2 * half))
    if width := facts.get("feature_projection_input_dim"):
        found.append((frames, width))
    if bins and (side := facts.get("spec_size", part="audio_config")):
        found.append((1, side * max(side // bins, 1), bins))
    if bins:
        found.append((frames, bins * (facts.get("input_channels") or 1)))
    return found or [(frames, 80)]


def contract(facts: Facts, reading: Reading) -> tuple[InputSpec, ...]:
    """The inputs that one reading gives, in the order of ``forward``.

    Raises:
        ToolchainError: none is known, or one that is needed is not; a size was asked for that nothing has.
    """
    inputs = Inputs(facts, reading)
    specs = {}
    for name in facts.known:
        spec = getattr(inputs, name)() if name in RULES else None
        if spec is not None:
            specs[name] = spec
    kind = type(facts.module).__name__
    needed = [name for name, p in facts.known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if lacking := [name for name in needed if name not in specs]:
        raise ToolchainError(f"{kind} needs {', '.join(lacking)}, and nothing is known here to give it")
    if not specs:
        raise ToolchainError(f"the inputs of {kind} ({', '.join(facts.known)}) are not known here")
    return tuple(with_asked(list(specs.values()), facts))


def with_asked(specs: list[InputSpec], facts: Facts) -> list[InputSpec]:
    """The inputs with the sizes that were asked for; dimensions of a single size become plain numbers.

    Raises:
        ToolchainError: no such dimension, or a size beyond what the model has positions for.
    """
    dims = {d.name: d for spec in specs for d in spec.shape if isinstance(d, Dim)}
    asked = dict(facts.asked)
    if "size" in asked and "size" not in dims and {"height", "width"} <= dims.keys():
        size = asked.pop("size")
        asked = {"height": size, "width": size, **asked}
    if strangers := [unknown("dimension", name, dims, where=facts.where) for name in asked.keys() - dims.keys()]:
        raise strangers[0] if len(strangers) == 1 else FaultsError(strangers)
    if "sequence" in asked and facts.positions and asked["sequence"].high > facts.positions:
        raise ToolchainError(
            f"sequence is {asked['sequence'].high}; the model has positions for {facts.positions} tokens",
            where=facts.where,
        )
    chosen = {name: dim_of(name, asked.get(name) or Limits(d.low, d.typical, d.high)) for name, d in dims.items()}
    return [
        replace(spec, shape=tuple(chosen[d.name] if isinstance(d, Dim) else d for d in spec.shape)) for spec in specs
    ]


class Inputs:
    """A method for each argument that is known: its input, or None where this model has no use for it."""

    def __init__(self, facts: Facts, reading: Reading) -> None:
        self.facts, self.reading = facts, reading

    def batch(self, tower: str, typical: int) -> Dim:
        """The number of texts, pictures or sounds."""
        several = {"input_ids", "pixel_values", "input_features", "input_values"} & {*self.facts.known}
        name = tower if self.reading.towers else "batch"
        return Dim(name=name, low=1, typical=2 if len(several) > 1 and not self.reading.towers else typical, high=64)

    def text(self) -> tuple[Dim, Dim]:
        """(B, N)."""
        limit = min(LONGEST, self.facts.trained_positions or LONGEST, self.facts.tokens or LONGEST)
        length = Dim(name="sequence", low=1, typical=min(64, limit), high=limit)
        return self.batch("texts", 2), length

    def tokens(self, name: str, high: Any, *more: int) -> InputSpec | None:
        """Whole numbers from 0 to below ``high`` for each token; None where there is nothing to choose from."""
        if not isinstance(high, int) or high < 2:
            return None
        return InputSpec(name=name, shape=(*self.text(), *more), dtype="int64", low=0, high=high)

    def input_ids(self) -> InputSpec | None:
        """Token ids (B, N); characters where the model has no vocabulary."""
        high = self.facts.get("vocab_size", part="text_config")
        return self.tokens("input_ids", high or (CHARACTERS if self.facts.get("num_hash_buckets") else None))

    def attention_mask(self) -> InputSpec | None:
        """1 for what counts, 0 for padding: of tokens (B, N), or of sounds (B, T)."""
        if "input_ids" in self.facts.known:
            return InputSpec(name="attention_mask", shape=self.text(), dtype="int64", low=1, high=2)
        return self.sound_mask()

    def input_features_mask(self) -> InputSpec:
        """The same for spectrograms (B, T), under the name that some models have for it."""
        sound = self.input_features()
        axis = next((i for i, d in enumerate(sound.shape) if i and isinstance(d, Dim)), len(sound.shape) - 1)
        shape = (sound.shape[0], sound.shape[axis])
        return InputSpec(name="input_features_mask", shape=shape, dtype="int64", low=1, high=2)

    def sound_mask(self) -> InputSpec | None:
        """The mask of sounds whose length changes, where the model was trained with one."""
        raw = "input_values" in self.facts.known
        if self.facts.module.main_input_name not in ("input_values", "input_features"):
            return None
        sound = self.input_values() if raw else self.input_features()
        wanted = self.facts.preprocessor.get("return_attention_mask")
        if wanted is None:
            wanted = self.facts.get("feat_extract_norm") == "layer" if raw else True
        length = next((d for d in sound.shape[1:] if isinstance(d, Dim)), None)
        if not wanted or length is None:
            return None
        return InputSpec(name="attention_mask", shape=(sound.shape[0], length), dtype="int64", low=1, high=2)

    def token_type_ids(self) -> InputSpec | None:
        """Segments (B, N)."""
        return self.tokens("token_type_ids", self.facts.get("type_vocab_size", part="text_config"))

    def bbox(self) -> InputSpec | None:
        """The box of each token on the page (B, N, 4): as fine as the model has positions, or from 0 to 1."""
        if self.facts.get("bbox_scale"):
            return InputSpec(name="bbox", shape=(*self.text(), 4), low=0, high=1, corners=True)
        spec = self.tokens("bbox", self.facts.get("max_2d_position_embeddings"), 4)
        return spec and replace(spec, corners=True)

    def xpath_tags_seq(self) -> InputSpec | None:
        """The tags around each token (B, N, depth)."""
        return self.tokens("xpath_tags_seq", self.facts.get("max_xpath_tag_unit_embeddings"), self.depth)

    def xpath_subs_seq(self) -> InputSpec | None:
        """The places of those among their siblings (B, N, depth)."""
        return self.tokens("xpath_subs_seq", self.facts.get("max_xpath_subs_unit_embeddings"), self.depth)

    @property
    def depth(self) -> int:
        """Tags around a token that are told."""
        return int(self.facts.get("max_depth") or 50)

    def input_shape_ids(self) -> InputSpec | None:
        """Shapes of Chinese characters (B, N)."""
        return self.tokens("input_shape_ids", self.facts.get("shape_vocab_size"))

    def input_pronunciation_ids(self) -> InputSpec | None:
        """Sounds of Chinese characters (B, N)."""
        return self.tokens("input_pronunciation_ids", self.facts.get("pronunciation_vocab_size"))

    def task_type_ids(self) -> InputSpec | None:
        """Tasks (B, N), of models that were trained for several."""
        used = self.facts.get("use_task_id")
        return self.tokens("task_type_ids", self.facts.get("task_type_vocab_size")) if used else None

    def langs(self) -> InputSpec | None:
        """Languages (B, N), of models that have an embedding for them."""
        used = self.facts.get("use_lang_emb") and (self.facts.get("n_langs") or 0) > 1
        return self.tokens("langs", self.facts.get("n_langs")) if used else None

    def visual_feats(self) -> InputSpec | None:
        """Features of regions of a picture (B, regions, D)."""
        width = self.facts.get("visual_feat_dim")
        return InputSpec(name="visual_feats", shape=(self.text()[0], *self.regions, width)) if width else None

    def visual_pos(self) -> InputSpec | None:
        """Places of those regions (B, regions, 4), from 0 to 1."""
        width = self.facts.get("visual_pos_dim")
        shape = (self.text()[0], *self.regions, width)
        return InputSpec(name="visual_pos", shape=shape, low=0, high=1) if width else None

    regions = (Dim(name="regions", low=1, typical=36, high=100),)

    def pixel_values(self) -> InputSpec:
        """Normalised pictures (B, C, H, W), or films (B, F, C, H, W)."""
        return self.pictures("pixel_values", picture_layouts(self.facts)[self.reading.pictures_layout], "num_frames")

    def pixel_values_videos(self) -> InputSpec | None:
        """Normalised films (B, F, C, H, W), of models that see nothing else."""
        if "pixel_values" in self.facts.known:
            return None
        return self.pictures("pixel_values_videos", "BFCHW", "frames_per_clip")

    def pictures(self, name: str, layout: str, frames: str) -> InputSpec:
        """Pictures or films, of the size that the reading has."""
        height, width = self.size
        axes: dict[str, Dim | int] = {
            "B": self.batch("images", 1),
            "F": fixed("frames", self.facts.get(frames) or 1),
            "C": self.facts.get("num_channels", "in_channels", "in_chans", part="vision_config") or 3,
            "H": height,
            "W": width,
        }
        return InputSpec(name=name, shape=tuple(axes[axis] for axis in layout))

    @property
    def size(self) -> tuple[Dim, Dim]:
        """Height and width: one size each unless the user asks for a range."""
        height, width = self.reading.picture
        return fixed("height", height), fixed("width", width)

    def pixel_mask(self) -> InputSpec:
        """1 for pixels of the picture, 0 for what it was padded with (B, H, W)."""
        shape = (self.batch("images", 1), *self.size)
        return InputSpec(name="pixel_mask", shape=shape, dtype="int64", low=1, high=2)

    def noise(self) -> InputSpec | None:
        """What decides which patches of a picture are hidden (B, patches): without it the model draws it itself."""
        patch = pair(self.facts.get("patch_size"))
        if patch is None or self.facts.get("mask_ratio") is None:
            return None
        height, width = self.reading.picture
        patches = (height // patch[0]) * (width // patch[1])
        return InputSpec(name="noise", shape=(self.batch("images", 1), patches), low=0, high=1)

    def input_values(self) -> InputSpec:
        """Sound: samples (B, T), or (B, channels, T); or a spectrogram of fixed length (B, T, bins)."""
        shape = sound_layouts(self.facts)[self.reading.sound_layout]
        return InputSpec(name="input_values", shape=(self.batch("sounds", 1), *shape))

    def input_features(self) -> InputSpec:
        """Spectrograms."""
        shape = sound_layouts(self.facts)[self.reading.sound_layout]
        return InputSpec(name="input_features", shape=(self.batch("sounds", 1), *shape))

    def past_values(self) -> InputSpec | None:
        """Measurements over time (B, T, channels)."""
        length, channels = self.facts.get("context_length"), self.facts.get("num_input_channels")
        if not length or not channels:
            return None
        return InputSpec(name="past_values", shape=(self.batch("series", 2), length, channels))


NO_RULES = ("batch", "text", "tokens", "sound_mask", "depth", "regions", "pictures", "size")
RULES = frozenset(name for name in vars(Inputs) if not name.startswith("_")) - frozenset(NO_RULES)
"""Arguments that can be inputs."""


def fixed(name: str, size: int) -> Dim:
    """A dimension of one size, that has a name so that a user can ask for another."""
    return Dim(name=name, low=size, typical=size, high=size)
