"""Which blocks of a student answer to which of its teacher, and what both say there in one call.

Attention maps are read where PyTorch's own ``scaled_dot_product_attention`` is called inside an attention layer, with
the masks and rotations that it gets; a layer that computes its attention otherwise has no map to read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from enginewright.passes.kernel.observe import Look, floats_in, looking
from enginewright.passes.recovery.losses import log_map
from enginewright.passes.traits import BlockStack, FixedAttention, HeadedAttention, layers_of

Pairs = Mapping[str, str]
"""Student's module path -> teacher's."""


def block_pairs(student: nn.Module, teacher: nn.Module, share: tuple[float, float] = (0, 1)) -> dict[str, str]:
    """Each block of the student and the teacher's of the same share of depth, where both have the stack.

    Args:
        student: blocks may have been taken out.
        teacher: the untouched one.
        share: blocks that end above the first and not above the second share of the depth.
    """
    theirs = {path: len(stack.blocks) for path, stack in layers_of(teacher, BlockStack)}
    pairs = {}
    for path, stack in layers_of(student, BlockStack):
        count = len(stack.blocks)
        for i in range(count) if path in theirs else ():
            depth = (i + 1) / count
            if share[0] < depth <= share[1]:
                other = max(math.floor(depth * theirs[path] + 0.5) - 1, 0)
                pairs[f"{path}.{i}"] = f"{path}.{other}"
    return pairs


def attention_pairs(student: nn.Module, teacher: nn.Module, blocks: Pairs) -> dict[str, str]:
    """Attention layers inside paired blocks that both have."""
    ours, theirs = attention_layers(student), set(attention_layers(teacher))
    found = {}
    for path in ours:
        for block, other in blocks.items():
            twin = other + path.removeprefix(block)
            if path.startswith(f"{block}.") and twin in theirs:
                found[path] = twin
    return found


def attention_layers(model: nn.Module) -> list[str]:
    """Paths of attention layers, whether their heads can be cut or not."""
    return [path for trait in (HeadedAttention, FixedAttention) for path, _ in layers_of(model, trait)]


@dataclass
class Watch(TorchFunctionMode):
    """While it is entered, keeps the results of blocks and the maps of attention layers, by path.

    Args:
        model: whose calls are watched.
        blocks: paths of blocks.
        attentions: paths of attention layers.
    """

    model: nn.Module
    blocks: Sequence[str]
    attentions: Sequence[str]
    results: dict[str, list[Tensor]] = field(default_factory=dict)
    maps: dict[str, list[Tensor]] = field(default_factory=dict)
    asked: list[tuple[str, Callable[[], Tensor]]] = field(default_factory=list)
    inside: list[str] = field(default_factory=list)
    looks: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        super().__init__()

    def __enter__(self) -> Watch:
        looks = [Look(self.model.get_submodule(path), after=partial(self.keep, path)) for path in self.blocks]
        for path in self.attentions:
            layer = self.model.get_submodule(path)
            looks.append(Look(layer, before=partial(self.enter, path), after=self.leave, always=True))
        self.looks.enter_context(looking(looks))
        if self.attentions:
            super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.attentions:
            super().__exit__(*error)
        # Not before: inside a block that is computed again on the way back, only the block's own work may be done.
        for path, compute in self.asked:
            self.maps.setdefault(path, []).append(compute())
        self.looks.close()

    def keep(self, path: str, inputs: Any, named: Any, result: object) -> None:
        """Note what a block gave."""
        self.results[path] = floats_in(result)

    def enter(self, path: str, inputs: Any, named: Any) -> None:
        """An attention layer begins."""
        self.inside.append(path)

    def leave(self, inputs: Any, named: Any, result: Any) -> None:
        """An attention layer is done."""
        self.inside.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside and func is F.scaled_dot_product_attention:
            self.asked.append((self.inside[-1], partial(map_of, *args, **kwargs)))
        return func(*args, **kwargs)


def map_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Logarithm of the map (B, H, N, M) of one call; the arguments are PyTorch's."""
    return log_map(query, key, attn_mask, causal=is_causal, scale=scale)
