"""Reference models: ``NAME:SIZE``, such as ``dit:XL/2``; the weights that ship, a file's, or random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from enginewright import catalog
from enginewright.ground.errors import unknown
from enginewright.sources.contract import Model, files_from
from enginewright.sources.filling import fill, without_memory
from enginewright.sources.jobs import Job
from enginewright.targets import stored

WEIGHTS = Path(__file__).resolve().parent.parent / "models" / "weights"


def load(text: str, *, weights: Path | None = None, seed: int = 0) -> Model:
    """Build a reference model in eval mode.

    Args:
        text: ``NAME`` or ``NAME:SIZE``; without a size, the one that ships weights.
        weights: a safetensors file with the model's parameter names.
        seed: for random weights, where none ship and none are given.

    Raises:
        ToolchainError: unknown name or size; weights that do not fit.
    """
    if "#" in text:
        whole, _, part = text.partition("#")
        text = part_of(whole, part)
    name, _, size = text.partition(":")
    module = catalog.load("models", name)
    sizes = sizes_of(module)
    if not size and len(module.SHIPPED) == 1:
        size = next(iter(module.SHIPPED))
    if size not in sizes:
        raise unknown(f"size of {name}", size, sizes, where=text)
    config = sizes[size]
    files = {} if weights is None else files_from(weights, [weights])
    shipped = WEIGHTS / f"{name}-{size}.safetensors"
    if weights is None and size in module.SHIPPED:
        weights = shipped
    net: nn.Module
    if weights is None:
        torch.manual_seed(seed)
        net = module.build(config)
        fill_zeros(net, seed)
        said = f"random, seed {seed}"
    else:
        with without_memory():
            net = module.build(config)
        tensors = stored.read(weights)
        if weights == shipped:  # some lie in half precision, to be small
            tensors = {
                name: tensor.float() if tensor.dtype == torch.half else tensor for name, tensor in tensors.items()
            }
        fill(net, tensors, where=weights)
        said = "trained, shipped" if weights == shipped else f"from {weights.name}"
    net.eval()
    at_work = weights is not None or not getattr(module, "JOB_NEEDS_TRAINING", True)
    return Model(
        name=f"{name}:{size}",
        module=net,
        inputs=module.inputs(config),
        outputs=outputs_of(module, config),
        weights=said,
        published=getattr(module, "FIGURES", {}).get(size, ()),
        files=files,
        task=module.task(size, config) if at_work and hasattr(module, "task") else None,
        realistic=module.realistic(net, size, config) if at_work and hasattr(module, "realistic") else None,
    )


def components(text: str) -> dict[str, str]:
    """For each part of a reference pipeline the model that it is; none for a model of one network.

    Args:
        text: ``NAME:SIZE``.

    Raises:
        ToolchainError: a pipeline without that size.
    """
    name, _, size = text.partition(":")
    if name not in catalog.entries("pipelines"):
        return {}
    sizes = catalog.load("pipelines", name).SIZES
    if size not in sizes:
        raise unknown(f"size of {name}", size, sizes, where=text)
    return dict(sizes[size].parts)


def part_of(whole: str, part: str) -> str:
    """The model string of a part of a reference pipeline.

    Raises:
        ToolchainError: it is no pipeline, or has no such part.
    """
    parts = components(whole)
    if part not in parts:
        raise unknown("part", part, parts, where=f"{whole}#{part}")
    return parts[part]


def job(text: str, **settings: Any) -> Job:
    """The whole job of a reference pipeline, ``NAME:SIZE``; settings are those of its own ``job``."""
    name, _, size = text.partition(":")
    found: Job = catalog.load("pipelines", name).job(size, **settings)
    return found


def sizes_of(module: Any) -> dict[str, Any]:
    """Every size of a model file, by name."""
    return {**module.PUBLISHED, **module.SHIPPED, "tiny": module.TINY}


def outputs_of(module: Any, config: Any) -> tuple[str, ...]:
    """Names of what a size of a model file puts out; most files say it of all sizes alike."""
    names: tuple[str, ...] = module.outputs(config) if hasattr(module, "outputs") else module.OUTPUTS
    return names


def fill_zeros(net: nn.Module, seed: int) -> None:
    """Give parameters that start at zero (gates, output layers) small random values.

    A network whose gates are shut puts out zero whatever its other weights are; nothing could be measured on it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02, generator=generator)
