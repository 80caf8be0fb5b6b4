"""New weights go to disk layer by layer while a pass rewrites a model, so that memory need not hold them all."""

from __future__ import annotations

import errno
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from enginewright.targets import stored

SMALLEST = 1 << 20
"""Bytes; smaller tensors stay in memory."""


class Scratch:
    """A folder whose files are mapped and unlinked at once: the disk gives the space back when the tensors go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def offload(self, layer: nn.Module) -> None:
        """Move a layer's tensors that lie in memory to disk, in place."""
        fresh = {name: tensor for name, tensor in layer.state_dict(keep_vars=True).items() if worth_moving(tensor)}
        if not fresh:
            return
        path = self.folder / f"{self.count}.safetensors"
        self.count += 1
        try:
            save_file({name: tensor.detach().contiguous() for name, tensor in fresh.items()}, path)
        except SafetensorError as cause:
            if "No space left" in str(cause) or "os error 28" in str(cause):
                raise OSError(errno.ENOSPC, "no space left for changed weights") from cause
            raise
        moved = stored.read(path, lasting=False)
        path.unlink()
        for name, tensor in fresh.items():
            owner, _, leaf = name.rpartition(".")
            replace(layer.get_submodule(owner), leaf, tensor, moved[name])


def worth_moving(tensor: Tensor) -> bool:
    """Whether a tensor is large and not on disk."""
    return tensor.numel() * tensor.element_size() >= SMALLEST and stored.place_of(tensor) is None


def replace(module: nn.Module, name: str, old: Tensor, new: Tensor) -> None:
    """Put a tensor in another's place."""
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        module._buffers[name] = new
