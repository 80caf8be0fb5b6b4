"""Adapters of an engine whose adapters are inputs: what to call it with for the adapter in a file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from enginewright import artifact
from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Arrays
from enginewright.opened import recorded, reopen
from enginewright.passes.specialize.adapter_files import read_adapters
from enginewright.passes.specialize.adapters_as_inputs import AdaptersAsInputs
from enginewright.sources.contract import read_interface


def adapter_inputs(
    folder: str | Path, file: str | Path, *, scale: float = 1.0, alpha: float | None = None, partly: bool = False
) -> Arrays:
    """The inputs that bring an adapter, for an artifact that was exported with ``adapters_as_inputs``.

    Where no array of these is given, the network is the base. The same arrays serve every call of a sampling run::

        engine = enginewright.load("out")
        style = enginewright.adapter_inputs("out", "style.safetensors", scale=0.8)
        image = engine(**call, **style)

    Args:
        folder: what ``enginewright export`` wrote.
        file: safetensors file of diffusers, peft or kohya with a LoRA.
        scale: multiplies the adapter's product.
        alpha: its lora_alpha, where neither the file nor ``adapter_config.json`` beside it says it.
        partly: go on when entries of the file match no layer that takes adapters.

    Returns:
        float32 arrays by input name: A of the layers that read D features, (layers, rank, D), and B of those that write
        D, (layers, D, rank), times scale * alpha / rank; zeros where the file adapts nothing or has a smaller rank.

    Raises:
        ToolchainError: the artifact's engines take no adapters, or not this one: of a larger rank, of another kind
            than LoRA, for other layers.
    """
    run = reopen(Path(folder))
    steps = [(step, plan) for step, plan in recorded(run, Path(folder)) if isinstance(step, AdaptersAsInputs)]
    taking = [(step, plan) for step, plan in steps if step.inputs == "matrices"]
    if not taking:
        raise ToolchainError(
            f"the engines of {str(folder)!r} take no adapters: their strength is the input"
            if steps
            else f"the engines of {str(folder)!r} take no adapters",
            help="export the model with the pass adapters_as_inputs",
        )
    [(step, plan)] = taking
    _, _, interface = read_interface(artifact.read_manifest(Path(folder)))
    config = SimpleNamespace(**interface.config) if interface.config else None
    found = read_adapters(str(file), Path(), of=config, alpha=alpha)
    arrays = step.model_copy(update={"partly": partly}).arrays_of(found, plan, scale=scale)
    return {name: tensor.numpy() for name, tensor in arrays.items()}
