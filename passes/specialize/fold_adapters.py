"""Add a low-rank adapter's product to the weights that it adapts, so that the engine runs at the base's cost.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1: W + (alpha / r) B A, with A (r, in) and B (out, r). Keys are
those of peft (``PATH.lora_A.weight``, ``PATH.lora_B.weight``), of diffusers (``PATH.lora.down.weight``,
``PATH.lora.up.weight``) and of kohya (``lora_unet_PATH.lora_down.weight``, with ``_`` for every dot), with prefixes
such as ``unet.`` or ``base_model.model.``. Alpha is ``PATH.alpha`` in the file, or what ``adapter_config.json`` beside
it says (peft's ``lora_alpha``, with its patterns and ``use_rslora``), or a parameter. Keys of diffusers and kohya
without alpha mean alpha = r; peft's mean nothing, and are refused. The sum is made in double precision and rounded
once. Linear layers and 2-D convolutions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.reading import read_json, read_tensors
from enginewright.passes.contract import Context, Pass, Plan
from enginewright.passes.kernel.surgery import share

PREFIXES = ("base_model.model.", "unet.", "transformer.", "text_encoder.", "model.")
"""What files put before the path inside the network."""

FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lora_te_", "lora_te1_", "lora_te2_")
"""What kohya's files put before a path whose dots are underscores."""

CONFIG = "adapter_config.json"
"""What peft writes beside its adapters."""

FORMS = {
    "down": re.compile(r"^(?P<path>.+?)\.(?:lora_A(?:\.default)?|lora\.down|lora_down)\.weight$"),
    "up": re.compile(r"^(?P<path>.+?)\.(?:lora_B(?:\.default)?|lora\.up|lora_up)\.weight$"),
    "alpha": re.compile(r"^(?P<path>.+?)\.(?:lora\.)?alpha$"),
}
"""What a key says: A (``down``), B (``up``) or alpha of a layer."""


class FoldAdapters(Pass):
    """Merge a LoRA into the weights; every key of its file is used, or the pass refuses."""

    intends: ClassVar[str] = "the original with adapters beside its layers"
    file: str = Field(default="", description="safetensors file with the adapter")
    scale: float = Field(default=1.0, description="multiplies the adapter's product")
    alpha: float | None = Field(
        default=None, gt=0, description="lora_alpha, where neither the file nor adapter_config.json beside it says"
    )
    partly: bool = Field(default=False, description="go on when keys of the file match nothing; they are listed")

    def moved(self, path: Callable[[str], str], model: Callable[[str], str]) -> Self:
        """The same for a recipe in another folder."""
        del model
        return self.model_copy(update={"file": path(self.file)}) if self.file else self

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Match the file's keys with layers.

        Raises ``ToolchainError`` for a file that is not there, shapes that do not fit, entries that match nothing or
        are half an adapter (unless ``partly``), and a file without an adapter for this model.
        """
        adapters, strange = paired(self.read(context))
        config = config_of(context.folder / self.file)
        choice: dict[str, Any] = {}
        arrays: dict[str, Tensor] = {}
        for path, adapter in adapters.items():
            place = place_of(model, path)
            if not place:
                strange.append(path)
                continue
            rank = adapter.down.shape[0]
            factor = self.scale * self.strength(path, rank, adapter, config)
            product(adapter.down, adapter.up, model.get_submodule(place), place)  # raises where it does not fit
            choice[place] = {"rank": rank, "factor": factor}
            arrays |= {f"{place}.down": adapter.down, f"{place}.up": adapter.up}
        if not choice:
            raise ToolchainError(f"no key of {self.file!r} adapts a layer of this model", help=listed(strange))
        if strange and not self.partly:
            raise ToolchainError(f"{len(strange)} entries of {self.file!r} match no layer", help=listed(strange))
        return Plan(choice=choice, facts={"fusable": not strange, "unmatched": sorted(strange)}, arrays=arrays)

    def strength(self, path: str, rank: int, adapter: Adapter, config: Mapping[str, Any]) -> float:
        """What a layer's product is multiplied by: alpha / r, or alpha / sqrt(r) with ``use_rslora``.

        Raises:
            ToolchainError: nobody says alpha, or the configuration says another rank than the file has.
        """
        alpha = adapter.alpha
        if alpha is None and config:
            wanted = by_pattern(config.get("rank_pattern"), path, config.get("r"))
            if wanted != rank:
                raise ToolchainError(f"{CONFIG} says rank {wanted}, the file has {rank}", where=path)
            alpha = by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha"))
        alpha = self.alpha if alpha is None else alpha
        if alpha is None and adapter.peft:
            raise ToolchainError(
                f"neither {self.file!r} nor {CONFIG!r} beside it says the adapter's alpha",
                where=path,
                help=f"put {CONFIG} beside the file, or give alpha: the lora_alpha that it was trained with",
            )
        alpha = rank if alpha is None else alpha
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ToolchainError(f"{CONFIG} says lora_alpha {alpha!r}, which is no number", where=path)
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Give each adapted layer a new weight, in place. Raises ``ToolchainError`` where it does not fit."""
        for path, entry in plan.choice.items():
            layer: Any = model.get_submodule(path)
            down, up = plan.arrays[f"{path}.down"], plan.arrays[f"{path}.up"]
            delta = entry["factor"] * product(down, up, layer, path)
            weight = (layer.weight.detach().double() + delta.to(layer.weight.device)).to(layer.weight.dtype)
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        return model

    def intended(self, model: nn.Module, plan: Plan, context: Context) -> nn.Module:
        """The original with each adapter run beside its layer, unfolded: a mistake of the fold shows against it."""
        adapted = share(model)
        for path, entry in plan.choice.items():
            down, up = plan.arrays[f"{path}.down"], plan.arrays[f"{path}.up"]
            adapted.get_submodule(path).register_forward_hook(partial(run_beside, down, up, entry["factor"]))
        return adapted

    def read(self, context: Context) -> dict[str, Tensor]:
        """The file's tensors."""
        if not self.file:
            raise ToolchainError(f"{self.name()} needs file: a safetensors file with an adapter")
        absent = f"there is no adapter file {self.file!r}"
        return read_tensors(context.folder / self.file, what=repr(self.file), absent=absent)


@dataclass
class Adapter:
    """Both factors of a layer's product, its alpha where the file says it, and whether its keys are peft's."""

    down: Tensor
    up: Tensor
    alpha: float | None
    peft: bool = False


def config_of(file: Path) -> dict[str, Any]:
    """What peft's configuration beside a file says; empty where there is none.

    Raises:
        ToolchainError: it is no configuration of a LoRA that can be folded.
    """
    path = file.parent / CONFIG
    if not path.exists():
        return {}
    found = read_json(path, what=CONFIG)
    if not isinstance(found, dict):
        raise ToolchainError(f"{CONFIG} holds no settings", where=str(path))
    kind = found.get("peft_type", "LORA")
    if kind != "LORA":
        raise ToolchainError(f"{CONFIG} is of {kind!r}; only LoRA adapters are folded", where=str(path))
    if found.get("use_dora"):
        raise ToolchainError(
            f"{CONFIG} says use_dora: DoRA scales each column of the sum, which this pass does not do",
            where=str(path),
            help="merge it with peft (merge_and_unload) and export the merged model",
        )
    return found


def by_pattern(patterns: Any, path: str, default: Any) -> Any:
    """peft's rule: the value of the first pattern that a path's end matches, or the default."""
    if isinstance(patterns, Mapping):
        for pattern, value in patterns.items():
            with suppress(re.error):
                if re.match(rf"(?:.*\.)?(?:{pattern})$", path):
                    return value
    return default


def run_beside(down: Tensor, up: Tensor, factor: float, layer: Any, args: Any, result: Tensor) -> Tensor:
    """A layer's output with its adapter's added: x A^T B^T, or the two convolutions."""
    (x,) = args
    down, up = down.to(x), up.to(x)
    if isinstance(layer, nn.Conv2d):
        inner = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return result + factor * F.conv2d(inner, up)
    return result + factor * F.linear(F.linear(x, down), up)


def paired(tensors: dict[str, Tensor]) -> tuple[dict[str, Adapter], list[str]]:
    """Adapters by the file's own path, and keys that are no part of one."""
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in sorted(tensors.items()):
        kind, match = next(((kind, m) for kind, form in FORMS.items() if (m := form.match(key))), ("", None))
        if match is None:
            strange.append(key)
        else:
            parts.setdefault(match["path"], {})[kind] = tensor
    whole = {}
    for path, found in parts.items():
        if not {"down", "up"} <= found.keys():
            strange.append(f"{path} ({' and '.join(found)} only)")
            continue
        alpha = float(found["alpha"]) if "alpha" in found else None
        peft = any(f"{path}.lora_A{middle}.weight" in tensors for middle in ("", ".default"))
        whole[path] = Adapter(down=found["down"], up=found["up"], alpha=alpha, peft=peft)
    return whole, strange


def place_of(model: nn.Module, path: str) -> str:
    """Path in the model of the layer that a file names; empty where there is none that can be adapted."""
    for prefix in ("", *PREFIXES):
        if not path.startswith(prefix):
            continue
        rest = path[len(prefix) :]
        for name, module in model.named_modules():
            if name.removeprefix("inner.") == rest and isinstance(module, nn.Linear | nn.Conv2d):
                return name
    for prefix in FLAT_PREFIXES:
        if path.startswith(prefix):
            for name, module in model.named_modules():
                flat = name.removeprefix("inner.").replace(".", "_")
                if flat == path[len(prefix) :] and isinstance(module, nn.Linear | nn.Conv2d):
                    return name
    return ""


def product(down: Tensor, up: Tensor, layer: nn.Module, path: str) -> Tensor:
    """B A in the shape of the layer's weight, in double precision."""
    weight: Any = layer.weight
    shape = tuple(weight.shape)
    fits = down.ndim == up.ndim == len(shape) and up.shape[0] == shape[0] and up.shape[1] == down.shape[0]
    if not fits or tuple(down.shape[1:]) != shape[1:] or up[0, 0].numel() != 1:
        raise ToolchainError(
            f"factors {tuple(down.shape)} and {tuple(up.shape)} do not make a weight of {shape}", where=path
        )
    return (up.double().flatten(1) @ down.double().flatten(1)).view(shape)


def listed(names: list[str]) -> str:
    """The first of some names."""
    return f"unmatched: {', '.join(sorted(names)[:12])}{', …' if len(names) > 12 else ''}" if names else ""
