"""Add an adapter's product to the weights that it adapts, so that the engine runs at the base's cost.

Sources: LoRA, Hu et al. 2021, arXiv:2106.09685, section 4.1 (W + (alpha / r) B A); DoRA, Liu et al. 2024,
arXiv:2402.09353; LoHa, Hyeon-Woo et al. 2021, arXiv:2108.06098; LoKr, Yeh et al. 2023, arXiv:2309.14859. Files are
those of peft, diffusers, kohya and LyCORIS (``adapter_files.py``), and what they add is computed by peft's own layers.
Alpha is ``PATH.alpha`` in the file, or what ``adapter_config.json`` beside it says (with its patterns and
``use_rslora``), or a parameter. Keys of diffusers and kohya without alpha mean alpha = r; others mean nothing, and are
refused. The sum is made in double precision and rounded once. Linear layers, embeddings and 2-D convolutions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sized
from functools import partial
from typing import Any, ClassVar, Self

from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan
from enginewright.passes.kernel.surgery import share
from enginewright.passes.specialize import adapter_files
from enginewright.passes.specialize.adapter_files import Adapter, AdapterFile, FoldedAdapter


class AdapterFacts(Facts):
    """How an adapter's file fits the model."""

    fusable: bool = Field(description="whether each of its tensors has a layer")
    unmatched: tuple[str, ...] = Field(description="its tensors that have none")


class FoldAdapters(Pass):
    """Merge a LoRA into the weights; every key of its file is used, or the pass refuses."""

    intends: ClassVar[str] = "the original with adapters beside its layers"
    decisions: ClassVar[tuple[type[Decision], ...]] = (FoldedAdapter,)
    facts: ClassVar[type[Facts]] = AdapterFacts

    file: str = Field(default="", description="safetensors file with the adapter")
    scale: float = Field(default=1.0, description="multiplies the adapter's product")
    alpha: float | None = Field(
        default=None, gt=0, description="lora_alpha, where neither the file nor adapter_config.json beside it says"
    )
    partly: bool = Field(default=False, description="go on when keys of the file match nothing; they are listed")

    def moved(self, path: Callable[[str], str], model: Callable[[str], str]) -> Self:
        """This pass as a recipe in another folder names its files and models."""
        del model
        return self.model_copy(update={"file": path(self.file)}) if self.file else self

    def plan(self, model: nn.Module, context: Context) -> Plan[FoldedAdapter]:
        """Match the file's keys with layers.

        Raises ``ToolchainError`` for a file that is not there, shapes that do not fit, entries that match nothing or
        are half an adapter (unless ``partly``), and a file without an adapter for this model.
        """
        if not self.file:
            raise ToolchainError(f"{self.name()} needs file: a safetensors file with an adapter")
        of = adapter_files.network_config(model)
        file = adapter_files.read_adapters(self.file, context.folder, of=of, alpha=self.alpha)
        placed, strange = file.placed(adapter_files.places_in(model))
        choice: dict[str, FoldedAdapter] = {}
        arrays: dict[str, Tensor] = {}
        for place, adapter in placed.items():
            layer = model.get_submodule(place)
            choice[place] = self.decision(place.removeprefix("inner."), adapter, file)
            if adapter.kind == "lokr":
                factor = adapter_files.decompose_factor(layer, adapter, file.config, place)
                choice[place] = choice[place].model_copy(update={"decompose_factor": factor})
            adapter_files.adapted(layer, choice[place], adapter.parts, place)  # raises where it does not fit
            arrays |= {f"{place}.{part}": tensor for part, tensor in adapter.parts.items()}
        file.refuse_unmatched(choice, strange, partly=self.partly)
        facts = AdapterFacts(
            fusable=not strange, unmatched=tuple(sorted(strange)), notes=(in_words(self.file, choice, strange),)
        )
        return Plan(choice=choice, facts=facts, arrays=arrays)

    def decision(self, path: str, adapter: Adapter, file: AdapterFile) -> FoldedAdapter:
        """What a layer's adapter is: its rank, what its product is multiplied by, and its kind unless a plain LoRA."""
        found = file.kind_of(path, adapter)
        kind = {} if found == "lora" else {"kind": found}
        return FoldedAdapter(rank=adapter.rank, factor=self.scale * file.factor(path, adapter), **kind)

    def rewrite(self, model: nn.Module, plan: Plan[FoldedAdapter]) -> nn.Module:
        """Give each adapted layer a new weight, in place. Raises ``ToolchainError`` where it does not fit."""
        for path, adapter in plan.choice.items():
            layer: Any = model.get_submodule(path)
            for name, tensor in folded(layer, adapter, parts_of(plan, path), path).items():
                old = getattr(layer, name)
                setattr(layer, name, nn.Parameter(tensor.to(old.dtype), requires_grad=old.requires_grad))
        return model

    def intended(self, model: nn.Module, plan: Plan[FoldedAdapter], context: Context) -> nn.Module:
        """The original with each adapter run beside its layer, unfolded: a mistake of the fold shows against it."""
        result = share(model)
        for path, adapter in plan.choice.items():
            layer = result.get_submodule(path)
            beside = adapter_files.adapted(layer, adapter, parts_of(plan, path), path)
            layer.register_forward_hook(partial(run_beside, beside))
        return result


def parts_of(plan: Plan, path: str) -> dict[str, Tensor]:
    """The tensors of one layer's adapter, by their names in it."""
    held = ((name.rpartition("."), array) for name, array in plan.arrays.items())
    return {part: array for (place, _, part), array in held if place == path}


def folded(layer: nn.Module, adapter: FoldedAdapter, parts: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """A layer's weight, and its bias where the adapter has one, with the adapter merged; in double precision."""
    base: Any = copy.deepcopy(layer).double()
    device = base.weight.device
    beside = adapter_files.adapted(
        base, adapter, {name: part.to(device).double() for name, part in parts.items()}, path
    )
    beside.merge()
    names = ("weight", "bias") if "bias" in parts else ("weight",)
    return {name: getattr(beside.get_base_layer(), name).detach() for name in names}


def run_beside(beside: Any, layer: Any, args: Any, result: Tensor) -> Tensor:
    """What peft's layer answers with its adapter unmerged, around the weight that the layer has now."""
    base = beside.get_base_layer()
    if base.weight is not layer.weight:
        base.weight, base.bias = layer.weight, getattr(layer, "bias", None)
    return beside.to(layer.weight.device, layer.weight.dtype)(*args)


def in_words(file: str, folded: Sized, strange: Sized) -> str:
    """What became of an adapter."""
    if strange:
        return f"{file!r} is fusable in part: {len(folded)} layers; {len(strange)} of its entries are left out"
    return f"{file!r} is fusable: it went into the weights of {len(folded)} layers; graph and cost are the base's"
