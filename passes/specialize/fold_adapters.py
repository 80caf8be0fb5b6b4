"""Add a low-rank adapter's product to the weights that it adapts, so that the engine runs at the base's cost.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1: W + (alpha / r) B A, with A (r, in) and B (out, r). Keys are
those of peft (``PATH.lora_A.weight``, ``PATH.lora_B.weight``) and of diffusers (``PATH.lora.down.weight``,
``PATH.lora.up.weight``), with prefixes such as ``unet.`` or ``base_model.model.``; alpha is ``PATH.alpha`` in the file,
or a parameter. The sum is made in double precision and rounded once. Linear layers and 2-D convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field
from torch import Tensor, nn

from passes.contract import Context, Pass, Plan
from passes.surgery import share
from toolchain.errors import ToolchainError
from toolchain.reading import read_tensors

PREFIXES = ("base_model.model.", "unet.", "transformer.", "text_encoder.", "model.")
"""What files put before the path inside the network."""

FORMS = {
    "down": re.compile(r"^(?P<path>.+?)\.(?:lora_A(?:\.default)?|lora\.down|lora_down)\.weight$"),
    "up": re.compile(r"^(?P<path>.+?)\.(?:lora_B(?:\.default)?|lora\.up|lora_up)\.weight$"),
    "alpha": re.compile(r"^(?P<path>.+?)\.(?:lora\.)?alpha$"),
}
"""What a key says: A (``down``), B (``up``) or alpha of a layer."""


class FoldAdapters(Pass):
    """Merge a LoRA into the weights; every key of its file is used, or the pass refuses."""

    file: str = Field(default="", description="safetensors file with the adapter")
    scale: float = Field(default=1.0, description="multiplies the adapter's product")
    alpha: float | None = Field(
        default=None, gt=0, description="peft's lora_alpha, where the file does not say; left out: the rank"
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
        choice: dict[str, Any] = {}
        arrays: dict[str, Tensor] = {}
        for path, adapter in adapters.items():
            place = place_of(model, path)
            if not place:
                strange.append(path)
                continue
            rank = adapter.down.shape[0]
            alpha = self.alpha if adapter.alpha is None else adapter.alpha
            factor = self.scale * (1.0 if alpha is None else alpha / rank)
            product(adapter.down, adapter.up, model.get_submodule(place), place)  # raises where it does not fit
            choice[place] = {"rank": rank, "factor": factor}
            arrays |= {f"{place}.down": adapter.down, f"{place}.up": adapter.up}
        if not choice:
            raise ToolchainError(f"no key of {self.file!r} adapts a layer of this model", help=listed(strange))
        if strange and not self.partly:
            raise ToolchainError(f"{len(strange)} entries of {self.file!r} match no layer", help=listed(strange))
        return Plan(choice=choice, facts={"fusable": not strange, "unmatched": sorted(strange)}, arrays=arrays)

    def rewrite(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Give each adapted layer a new weight, in place. Raises ``ToolchainError`` where it does not fit."""
        for path, entry in plan.choice.items():
            layer: Any = model.get_submodule(path)
            down, up = plan.arrays[f"{path}.down"], plan.arrays[f"{path}.up"]
            delta = entry["factor"] * product(down, up, layer, path)
            weight = (layer.weight.detach().double() + delta.to(layer.weight.device)).to(layer.weight.dtype)
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        return model

    def reference(self, original: nn.Module, plan: Plan) -> nn.Module:
        """The original with the adapter in it: what is compared is what other steps and engines add to that."""
        return self.rewrite(share(original), plan)

    def read(self, context: Context) -> dict[str, Tensor]:
        """The file's tensors."""
        if not self.file:
            raise ToolchainError(f"{self.name()} needs file: a safetensors file with an adapter")
        absent = f"there is no adapter file {self.file!r}"
        return read_tensors(context.folder / self.file, what=repr(self.file), absent=absent)


@dataclass
class Adapter:
    """Both factors of a layer's product, and its alpha where the file says it."""

    down: Tensor
    up: Tensor
    alpha: float | None


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
        whole[path] = Adapter(down=found["down"], up=found["up"], alpha=alpha)
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
