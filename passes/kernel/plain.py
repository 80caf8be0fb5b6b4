"""Make a model one whose layers can be taken out and put in: what PyTorch or a library hides comes in its plain form.

Two things stand in the way, whatever the pass. PyTorch's transformer encoder has an inference path of one fused kernel
that reads the weights of its children and never calls them, so that a layer in a child's place is passed by or has no
such weight. And GPT-2's ``Conv1D`` is a linear layer that keeps its weight the other way round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def plain(model: nn.Module) -> nn.Module:
    """The same model, changed in place: no fused inference path, and ``nn.Linear`` where a layer is one."""
    without_fast_path(model)
    for path, module in list(model.named_modules()):
        if path and is_turned_linear(module):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, turned(module))
    return model


def without_fast_path(model: nn.Module) -> nn.Module:
    """Let every transformer encoder of PyTorch call its children, in place; what it computes differs by rounding."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # what its forward asks before it takes the fused kernel
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return model


def is_turned_linear(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``: y = x W + b with W (in, out); known by structure."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(weight, Tensor)
        and isinstance(bias, Tensor)
        and weight.ndim == 2
        and tuple(weight.shape) == (getattr(module, "nx", None), getattr(module, "nf", None))
    )


def turned(module: Any) -> nn.Linear:
    """The linear layer that computes what a Conv1D does, around a view of its weight."""
    inputs, outputs = module.weight.shape
    with torch.device("meta"):
        layer = nn.Linear(inputs, outputs, dtype=module.weight.dtype)
    layer.weight = nn.Parameter(module.weight.detach().T, requires_grad=module.weight.requires_grad)
    layer.bias = module.bias
    return layer.train(module.training)
