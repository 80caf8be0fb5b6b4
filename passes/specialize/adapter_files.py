"""Adapters as files hold them, by the layer that each adapts, and the layers that peft builds from them.

Keys are those of peft (``PATH.lora_A.weight``), of diffusers (``PATH.lora.down.weight``) and of kohya and LyCORIS
(``lora_unet_PATH.lora_down.weight``, with ``_`` for every dot, or with the block names of the original Stable Diffusion
and Flux, which diffusers' own converters rename). What an adapter computes is peft's: nothing here multiplies factors.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError, require
from enginewright.ground.reading import first_line, read_json, read_tensors
from enginewright.passes.contract import Decision
from enginewright.passes.kernel.plain import is_turned_linear
from enginewright.passes.kernel.surgery import share

Kind = Literal["lora", "dora", "loha", "lokr"]

ADAPTED = (nn.Linear, nn.Conv2d, nn.Embedding)
"""Layers that can be adapted, beside transformers' ``Conv1D``."""

PREFIXES = ("base_model.model.", "unet.", "transformer.", "text_encoder.", "model.", "diffusion_model.")
"""What files put before the path inside the network."""

FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_", "lycoris_")
"""What kohya's and LyCORIS's files put before a path whose dots are underscores."""

CONFIG = "adapter_config.json"
"""What peft writes beside its adapters."""

FORMS = {
    "down": re.compile(r"^(?P<path>.+?)\.(?:lora_A(?:\.default)?\.weight|lora[._]down\.weight|lora_embedding_A)$"),
    "up": re.compile(r"^(?P<path>.+?)\.(?:lora_B(?:\.default)?\.weight|lora[._]up\.weight|lora_embedding_B)$"),
    "bias": re.compile(r"^(?P<path>.+?)\.lora_B(?:\.default)?\.bias$"),
    "magnitude": re.compile(r"^(?P<path>.+?)\.(?:lora_magnitude_vector(?:\.default)?(?:\.weight)?|dora_scale)$"),
    "alpha": re.compile(r"^(?P<path>.+?)\.(?:lora\.)?alpha$"),
} | {
    part: re.compile(rf"^(?P<path>.+?)\.{part}(?:\.default)?$")
    for part in (
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    )
}
"""Which part of a layer's adapter a key holds."""

OF_PEFT = {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}
"""peft's names of parts that we name otherwise."""


class FoldedAdapter(Decision):
    """The adapter of one layer."""

    arrays: ClassVar[Mapping[str, str]] = {f".{part}": f"the adapter's {part}" for part in FORMS if part != "alpha"}

    rank: int = Field(description="of its factors")
    factor: float = Field(description="what their product is multiplied by")
    kind: Kind = Field("lora", description="how the product is made of the factors")
    decompose_factor: int | None = Field(None, description="into what a LoKr divides the layer's sizes")


MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of ``init_lora_weights`` with which training changed the base's own weights before it began."""


UNKNOWN = (ValueError, KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError)
"""What diffusers' converters raise for keys that they do not know; they have no error of their own."""


@dataclass(kw_only=True)
class Adapter:
    """The tensors that adapt one layer, its alpha where the file says it, and whether somebody else must say it."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None
    needs_alpha: bool = False

    @property
    def kind(self) -> Kind | None:
        """What it is; None for half an adapter."""
        names = self.parts.keys()
        if {"down", "up"} <= names:
            return "dora" if "magnitude" in names else "lora"
        if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= names:
            return "loha"
        whole = all(f"{w}" in names or {f"{w}_a", f"{w}_b"} <= names for w in ("lokr_w1", "lokr_w2"))
        return "lokr" if whole else None

    @property
    def rank(self) -> int:
        """Its rank, as its factors' shapes have it; of whole matrices, one with which peft leaves them whole."""
        parts = self.parts
        narrow = next((parts[name] for name in ("down", "hada_w1_b", "lokr_w2_b") if name in parts), None)
        return narrow.shape[0] if narrow is not None else max(parts["lokr_w2"].shape)

    @property
    def is_whole(self) -> bool:
        """Whether it is a Kronecker product without a low-rank factor, whose alpha LyCORIS does not use."""
        return {"lokr_w1", "lokr_w2"} <= self.parts.keys()


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """The adapters of one file, by the file's own path of the layer that each adapts.

    Args:
        name: of the file, as the user wrote it.
        adapters: what it holds.
        strange: its keys that are no part of an adapter, and halves of one.
        config: what peft's configuration beside it says.
        default_alpha: lora_alpha where neither the file nor the configuration says it.
    """

    name: str
    adapters: Mapping[str, Adapter]
    strange: tuple[str, ...]
    config: Mapping[str, Any]
    default_alpha: float | None

    def placed(self, places: Mapping[str, str]) -> tuple[dict[str, Adapter], list[str]]:
        """Adapters by module path, given the paths by each name that a file may use; and all that matches nothing.

        Raises:
            ToolchainError: two entries are for one layer.
        """
        found: dict[str, Adapter] = {}
        strange = list(self.strange)
        for path, adapter in self.adapters.items():
            if path not in places:
                strange.append(path)
            elif places[path] in found:
                raise ToolchainError(f"{self.name!r} adapts this layer under two names", where=places[path])
            else:
                found[places[path]] = adapter
        return found, strange

    def refuse_unmatched(self, found: Collection[str], strange: Sequence[str], *, partly: bool) -> None:
        """Raise ``ToolchainError`` where no layer was found, or not all entries may be left out (``partly``)."""
        if not found:
            raise ToolchainError(f"no key of {self.name!r} adapts a layer of this model", help=listed(strange))
        if strange and not partly:
            raise ToolchainError(f"{len(strange)} entries of {self.name!r} match no layer", help=listed(strange))

    def kind_of(self, path: str, adapter: Adapter) -> Kind:
        """An adapter's kind. Raises ``ToolchainError`` where the configuration says otherwise than the file."""
        said = self.config.get("peft_type", "LORA")
        if self.config and said.lower() != (adapter.kind or "").replace("dora", "lora"):
            raise ToolchainError(f"{CONFIG} is of {said!r}, the file holds a {adapter.kind}", where=path)
        if self.config.get("use_dora") and adapter.kind == "lora":
            raise ToolchainError(f"{CONFIG} says use_dora, and {self.name!r} has no magnitudes", where=path)
        assert adapter.kind is not None, "halves are strange keys"
        return adapter.kind

    def factor(self, path: str, adapter: Adapter) -> float:
        """What a layer's product is multiplied by: alpha / r, or alpha / sqrt(r) with ``use_rslora``.

        Raises:
            ToolchainError: nobody says alpha, or the configuration says otherwise than the file.
        """
        config, alpha, rank = self.config, adapter.alpha, adapter.rank
        if adapter.is_whole and alpha is not None:
            return 1.0
        if alpha is None and config:
            wanted = by_pattern(config.get("rank_pattern"), path, config.get("r"))
            if adapter.is_whole:
                rank = wanted
            if wanted != rank or not is_number(wanted) or wanted < 1:
                raise ToolchainError(f"{CONFIG} says rank {wanted}, the file has {rank}", where=path)
            default = config.get("lora_alpha" if adapter.kind in ("lora", "dora") else "alpha")
            alpha = by_pattern(config.get("alpha_pattern"), path, default)
        alpha = self.default_alpha if alpha is None else alpha
        if alpha is None and adapter.needs_alpha:
            raise ToolchainError(
                f"neither {self.name!r} nor {CONFIG!r} beside it says the adapter's alpha",
                where=path,
                help=f"put {CONFIG} beside the file, or give alpha: the lora_alpha that it was trained with",
            )
        alpha = rank if alpha is None else alpha
        if not is_number(alpha):
            raise ToolchainError(f"{CONFIG} says lora_alpha {alpha!r}, which is no number", where=path)
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def read_adapters(name: str, folder: Path, *, of: Any, alpha: float | None) -> AdapterFile:
    """The adapters of a safetensors file.

    Args:
        name: its path, as the user wrote it.
        folder: where that starts.
        of: the configuration of the network that it is for, where diffusers knows one; else None.
        alpha: lora_alpha, where nobody else says it.

    Raises:
        ToolchainError: it is not there or cannot be read, or its keys cannot be renamed.
    """
    absent = f"there is no adapter file {name!r}"
    tensors = read_tensors(folder / name, what=repr(name), absent=absent)
    adapters, strange = adapters_in(renamed(tensors, of))
    config = config_of(folder / name)
    return AdapterFile(name=name, adapters=adapters, strange=tuple(strange), config=config, default_alpha=alpha)


def network_config(model: nn.Module) -> Any:
    """The configuration of a network of diffusers; None for another."""
    return getattr(getattr(model, "inner", model), "config", None)


def listed(names: Sequence[str]) -> str:
    """The first of some names."""
    return f"unmatched: {', '.join(sorted(names)[:12])}{', …' if len(names) > 12 else ''}" if names else ""


def adapters_in(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Adapter], list[str]]:
    """Adapters by the file's own path, and keys that are no part of one."""
    found: dict[str, Adapter] = {}
    strange = []
    for key, tensor in sorted(tensors.items()):
        part, match = next(((part, m) for part, form in FORMS.items() if (m := form.match(key))), ("", None))
        if match is None:
            strange.append(key)
            continue
        adapter = found.setdefault(match["path"], Adapter())
        if part == "alpha":
            if tensor.numel() != 1:
                raise ToolchainError(f"alpha has {tensor.numel()} elements; it is one number", where=key)
            adapter.alpha = float(tensor)
        else:
            adapter.parts[part] = tensor
            adapter.needs_alpha |= part in ("hada_w1_a", "lokr_w1", "lokr_w1_a")
            adapter.needs_alpha |= ".lora_A" in key or ".lora_embedding_A" in key
    for path in [path for path, adapter in found.items() if adapter.kind is None or 0 in shape_of(adapter)]:
        held = sorted({*found[path].parts, *(["alpha"] if found[path].alpha is not None else [])})
        strange.append(f"{path} ({' and '.join(held)} only)")
        del found[path]
    return found, strange


def shape_of(adapter: Adapter) -> list[int]:
    """Every size of every part; 0 for a part without axes."""
    return [size for tensor in adapter.parts.values() for size in (tensor.shape or (0,))]


def places_in(model: nn.Module) -> dict[str, str]:
    """Paths of the layers that can be adapted, by each name that a file may give them."""
    modules = model.named_modules()
    return named_by_files(path for path, module in modules if isinstance(module, ADAPTED) or is_turned_linear(module))


def named_by_files(paths: Iterable[str]) -> dict[str, str]:
    """Module paths by each name that a file may give them."""
    found: dict[str, str] = {}
    for path in paths:
        name = path.removeprefix("inner.")
        found |= {f"{prefix}{name}": path for prefix in ("", *PREFIXES) if f"{prefix}{name}" not in found}
        found |= {f"{prefix}{name.replace('.', '_')}": path for prefix in FLAT_PREFIXES}
    return found


def renamed(tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """A file's tensors by the names of diffusers' layers, where its keys are those of an original network.

    Args:
        tensors: of the file.
        config: of the network that the adapter is for; None where it has none.

    Raises:
        ToolchainError: diffusers takes the keys for those of a network that it knows, and cannot rename them.
    """
    tensors = dict(tensors)
    flux = any(part in key for key in tensors for part in ("double_blocks", "single_blocks"))
    blocks = any(part in key for key in tensors for part in ("input_blocks", "middle_block", "output_blocks"))
    if not flux and not (blocks and hasattr(config, "layers_per_block")):
        return tensors
    converters: Any = require("diffusers.loaders.lora_conversion_utils", extra="diffusers")
    kohya = any(".lora_down." in key for key in tensors)
    try:
        if blocks:
            mapped = converters._maybe_map_sgm_blocks_to_diffusers(tensors, config)
            return {unet_key(key): tensor for key, tensor in mapped.items()}
        if kohya:
            names = {key.partition(".")[0] for key in tensors}
            unknown = {name for name in names if not converts(converters, tensors, name)}
            strange = [key for key in tensors if key.partition(".")[0] in unknown]
            found = converters._convert_kohya_flux_lora_to_diffusers(
                {key: tensor for key, tensor in tensors.items() if key not in strange}
            )
        else:
            strange = []
            found = converters._convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    except UNKNOWN as cause:
        raise ToolchainError(f"diffusers cannot rename the adapter's keys: {first_line(cause)}") from cause
    # Alpha is in the factors now, which is what keys of kohya without one mean.
    found = {key.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up."): t for key, t in found.items()}
    return found | {key: tensors[key] for key in strange}


def converts(converters: Any, tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether diffusers' converter knows a layer of the original Flux: it drops others with a line in the log."""
    own = {key: tensor for key, tensor in tensors.items() if key.partition(".")[0] == name}
    with contextlib.suppress(*UNKNOWN):
        return bool(converters._convert_kohya_flux_lora_to_diffusers(own))
    return False


def unet_key(key: str) -> str:
    """A key of kohya for the original UNet, by the path of diffusers' layer; other keys as they are."""
    name, _, part = key.partition(".")
    if not name.startswith("lora_unet_"):
        return key
    converters: Any = require("diffusers.loaders.lora_conversion_utils", extra="diffusers")
    naming: Any = require("diffusers.utils.state_dict_utils", extra="diffusers")
    old = converters._convert_unet_lora_key(f"{name}.lora_down.weight").replace(".processor.", ".")
    (new,) = naming.convert_unet_state_dict_to_peft({old: None})
    return f"{new.removesuffix('.lora_A.weight')}.{part}"


def config_of(file: Path) -> dict[str, Any]:
    """What peft's configuration beside a file says; empty where there is none.

    Raises:
        ToolchainError: it is no configuration of an adapter that can be folded.
    """
    path = file.parent / CONFIG
    if not path.exists():
        return {}
    found = read_json(path, what=CONFIG)
    if not isinstance(found, dict):
        raise ToolchainError(f"{CONFIG} holds no settings", where=str(path))
    kind = found.get("peft_type", "LORA")
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise ToolchainError(f"{CONFIG} is of {kind!r}; LoRA, LoHa and LoKr adapters are folded", where=str(path))
    start = found.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVES_THE_BASE):
        raise ToolchainError(
            f"{CONFIG} says init_lora_weights {start!r}: the adapter is for weights that this start had changed",
            where=str(path),
            help="save it as a plain LoRA with peft (path_initial_model_for_weight_conversion)",
        )
    return found


def by_pattern(patterns: Any, path: str, default: Any) -> Any:
    """The value of the first of peft's patterns that a path's end matches, or the default."""
    if not isinstance(patterns, Mapping) or not patterns:
        return default
    key_of = require("peft.utils.other", extra="peft").get_pattern_key
    try:
        return patterns.get(key_of(patterns, path), default)
    except re.error as cause:
        raise ToolchainError(f"{CONFIG} has a pattern that is no regular expression: {cause}", where=path) from cause


def is_number(value: Any) -> bool:
    """Whether something that a file says is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def adapted(layer: Any, adapter: FoldedAdapter, parts: Mapping[str, Tensor], path: str) -> Any:
    """peft's layer around a layer, with the adapter's tensors in it.

    Args:
        layer: what is adapted; the result holds a copy of it around the same weight.
        adapter: what it is.
        parts: the adapter's tensors, by our names of them.
        path: of the layer, for errors.

    Raises:
        ToolchainError: the tensors do not fit the layer.
    """
    peft = require("peft", extra="peft")
    holder = nn.ModuleDict({"layer": share(layer)})
    trained = [(tensor, tensor.requires_grad) for tensor in layer.parameters()]
    embeds = isinstance(layer, nn.Embedding)
    of_peft = OF_PEFT | {"down": "lora_embedding_A", "up": "lora_embedding_B"} if embeds else OF_PEFT
    tensors = {f"layer.{of_peft.get(part, part)}": tensor.detach() for part, tensor in parts.items()}
    if "magnitude" in parts and not embeds:
        tensors["layer.lora_magnitude_vector"] = magnitude_of(layer, parts["magnitude"])
    try:
        # Empty parameters: peft would else draw random ones, and the recipe's seed would lead elsewhere.
        peft.inject_adapter_in_model(config_for(layer, adapter, parts), holder, low_cpu_mem_usage=True)
        result = peft.set_peft_model_state_dict(holder, tensors, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, ZeroDivisionError) as cause:
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in parts.items())
        raise ToolchainError(
            f"the adapter's {shapes} do not fit a {type(layer).__name__} with a weight of {tuple(layer.weight.shape)}",
            where=path,
            help=f"peft says: {first_line(cause)}",
        ) from cause
    finally:
        for tensor, requires_grad in trained:  # which peft turns off
            tensor.requires_grad_(requires_grad)
    absent = [name for name in result.missing_keys if ".base_layer." not in name]
    if result.unexpected_keys or absent:
        strange = ", ".join([*result.unexpected_keys, *absent])
        raise ToolchainError(f"the adapter's tensors are not those of its kind: {strange}", where=path)
    for name, tensor in holder.named_parameters():
        if ".base_layer." not in name:
            tensor.requires_grad_(False)
    return holder["layer"].eval()


def magnitude_of(layer: Any, magnitude: Tensor) -> Tensor:
    """A DoRA's magnitudes in the shape that peft gives them: (out,), or (1, out, 1, 1) of a convolution."""
    outputs = layer.weight.shape[1 if is_turned_linear(layer) else 0]
    if magnitude.numel() != outputs:
        return magnitude
    return magnitude.reshape(1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else magnitude.reshape(-1)


def config_for(layer: nn.Module, adapter: FoldedAdapter, parts: Mapping[str, Tensor]) -> Any:
    """peft's configuration of one layer's adapter."""
    peft = require("peft", extra="peft")
    kind, rank = adapter.kind, adapter.rank
    strength = adapter.factor * rank
    if kind in ("lora", "dora"):
        return peft.LoraConfig(
            r=rank,
            lora_alpha=strength,
            target_modules=["layer"],
            use_dora=kind == "dora",
            lora_bias="bias" in parts,
            fan_in_fan_out=is_turned_linear(layer),
        )
    effective = any(name in parts for name in ("hada_t1", "lokr_t2"))
    if kind == "loha":
        return peft.LoHaConfig(r=rank, alpha=strength, target_modules=["layer"], use_effective_conv2d=effective)
    return peft.LoKrConfig(
        r=rank,
        alpha=strength,
        target_modules=["layer"],
        use_effective_conv2d=effective,
        decompose_both="lokr_w1_a" in parts,
        decompose_factor=adapter.decompose_factor,
    )


def decompose_factor(layer: nn.Module, adapter: Adapter, config: Mapping[str, Any], path: str) -> int:
    """Into what a LoKr divides a layer's sizes: what peft's configuration says, or else what its tensors fit.

    Raises:
        ToolchainError: they fit none.
    """
    said = config.get("decompose_factor")
    if isinstance(said, int):
        return said
    first = adapter.parts.get("lokr_w1")
    sizes = (
        first.shape
        if first is not None
        else (adapter.parts["lokr_w1_a"].shape[0], adapter.parts["lokr_w1_b"].shape[-1])
    )
    fault = None
    for factor in (-1, *sizes):
        try:
            tried = FoldedAdapter(kind="lokr", rank=adapter.rank, factor=1.0, decompose_factor=factor)
            adapted(layer, tried, adapter.parts, path)
        except ToolchainError as cause:
            fault = cause
        else:
            return factor
    assert fault is not None
    raise fault
