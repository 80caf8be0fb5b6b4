"""Reference models: ``NAME:SIZE``, such as ``dit:XL/2``; the weights that ship, a file's, or random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from toolchain import catalog
from toolchain.errors import ToolchainError, unknown
from toolchain.sources.contract import Model

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
    name, _, size = text.partition(":")
    module = catalog.load("models", name)
    sizes = sizes_of(module)
    if not size and len(module.SHIPPED) == 1:
        size = next(iter(module.SHIPPED))
    if size not in sizes:
        raise unknown(f"size of {name}", size, sizes, where=text)
    config = sizes[size]
    torch.manual_seed(seed)
    net: nn.Module = module.build(config)
    shipped = WEIGHTS / f"{name}-{size}.safetensors"
    if weights is None and size in module.SHIPPED:
        weights = shipped
    if weights is None:
        fill_zeros(net, seed)
        said = f"random, seed {seed}"
    else:
        load_weights(net, weights)
        said = "trained, shipped" if weights == shipped else f"from {weights.name}"
    net.eval()
    return Model(
        name=f"{name}:{size}",
        module=net,
        inputs=module.inputs(config),
        outputs=module.OUTPUTS,
        weights=said,
        published=getattr(module, "FIGURES", {}).get(size, ()),
        task=module.task(size, config) if hasattr(module, "task") and weights is not None else None,
        realistic=module.realistic(net, size, config) if hasattr(module, "realistic") and weights is not None else None,
    )


def sizes_of(module: Any) -> dict[str, Any]:
    """Every size of a model file, by name."""
    return {**module.PUBLISHED, **module.SHIPPED, "tiny": module.TINY}


def fill_zeros(net: nn.Module, seed: int) -> None:
    """Give parameters that start at zero (gates, output layers) small random values.

    A network whose gates are shut puts out zero whatever its other weights are; nothing could be measured on it.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02, generator=generator)


def load_weights(net: nn.Module, path: Path) -> None:
    """Read a safetensors file into a network; every parameter once, nothing left over."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except FileNotFoundError as cause:
        raise ToolchainError(f"there is no weights file {path.name!r}", where=str(path)) from cause
    except SafetensorError as cause:
        raise ToolchainError(
            f"{path.name} is not a whole safetensors file: {cause}",
            where=str(path),
            help="it may have been cut short; copy or download it again",
        ) from cause
    wanted = net.state_dict()
    faults = [f"missing {name}" for name in wanted.keys() - state.keys()]
    faults += [f"unknown {name}" for name in state.keys() - wanted.keys()]
    faults += [
        f"{name} is {tuple(state[name].shape)}, the model has {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    if faults:
        listed = "; ".join(sorted(faults)[:8]) + ("; …" if len(faults) > 8 else "")
        raise ToolchainError(f"{path.name} does not fit the model ({len(faults)} tensors): {listed}", where=str(path))
    net.load_state_dict(state, assign=True)
