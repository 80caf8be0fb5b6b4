"""What a pass may ask of a model, whatever its class: traits, and the families that answer for their layers.

A family is one file under ``passes/families/`` with a function ``recognise(module) -> Trait | None`` for each trait
it knows (named in its ``RECOGNISERS``). Families look at a layer's structure and import no model library.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar, cast

from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes import families as families_folder

Place = tuple[nn.Module, str]
"""A module and the name of one of its children."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Tokens of one kind on their way through an attention layer.

    Args:
        value: where the projection is whose last ``heads * head_dim`` features are the values, head after head.
        output: where the projection is that reads the heads' results for these tokens.
        tokens: ``own``: the layer's own; ``text``: text that attends along with them; ``both`` in one row.
        shared: how many times over a head's columns repeat its values: several query heads may read one.
    """

    value: Place
    output: Place
    tokens: Literal["own", "text", "both"] = "own"
    shared: int = 1


class HeadedAttention(ABC):
    """An attention layer whose heads can be told apart and taken out.

    Attributes:
        heads: number of heads.
        head_dim: width of a head; head h owns columns h*head_dim to (h+1)*head_dim of each output's input.
        output: the projection that reads all heads' results; columns after theirs belong to something else.
        outputs: every projection that does, one for each kind of token; ``output`` comes first.
        streams: the tokens whose values are at hand beside the results; none where the values are of other tokens.
    """

    heads: int
    head_dim: int
    output: nn.Linear
    outputs: tuple[nn.Linear, ...]
    streams: tuple[Stream, ...]

    @abstractmethod
    def keep_heads(self, kept: Sequence[int]) -> None:
        """Take every other head out: smaller matrices, and the layer's own counts set to match."""

    def silence(self, model: nn.Module, path: str) -> None:
        """Put in the place of the whole layer, which the model has at ``path``, one that answers zeros in its form.

        Raises ``ToolchainError`` where the family does not say which form that is.
        """
        raise ToolchainError(f"no family knows what stands in for a whole {type(model.get_submodule(path)).__name__}")


class FeedForward(ABC):
    """Two projections with a hidden width between them: x -> output(activation(inputs(x))), no residual, no norm.

    Attributes:
        hidden: number of hidden units; unit i owns column ``first_column + i`` of ``output``'s input.
        inputs: the projections that write the hidden units.
        stacks: how often all units follow one another in an input projection: 2 for a fused gated one.
        output: the projection that reads them.
        first_column: where the hidden units begin in ``output``'s input; above 0 where it reads something else too.
    """

    hidden: int
    inputs: tuple[nn.Linear, ...]
    stacks: int
    output: nn.Linear
    first_column: int

    @abstractmethod
    def keep_hidden(self, kept: Sequence[int]) -> None:
        """Take every other hidden unit out, in place: smaller matrices. Spent afterwards: ask anew."""

    @abstractmethod
    def standalone(self, kept: Sequence[int]) -> nn.Module:
        """A module x (..., D) -> (..., D) of these units alone, with the output's bias; shares nothing that changes."""

    @abstractmethod
    def replace_in(self, model: nn.Module, path: str, module: nn.Module) -> None:
        """Put a module x (..., D) -> (..., D) in the place of the whole layer, which the model has at ``path``.

        Raises ``ToolchainError`` where it cannot be told apart from what surrounds it.
        """


class StreamBlock:
    """Declared by a class of blocks whose ``forward`` takes a stream first and gives one of the same shape.

    A list of such blocks is a stack. It is believed as any other is: after a call has been followed.
    """


@dataclass(frozen=True)
class BlockStack:
    """Blocks of one kind in a row, each of which takes what the one before it gave: most of them can be left out.

    Args:
        blocks: in order.
        fixed: positions of those that must stay, and why.
        holder: the module that calls them in a loop, if it is known.
    """

    blocks: nn.ModuleList
    fixed: Mapping[int, str] = field(default_factory=dict)
    holder: nn.Module | None = None

    def keep_blocks(self, kept: Sequence[int]) -> None:
        """Take every other block out, in place. Spent afterwards: ask anew.

        What the holder reads by a block's position in its configuration is cut alike, in a copy of its own.
        """
        assert kept, "a stack needs at least one block"
        assert set(self.fixed) <= set(kept), f"blocks {sorted(self.fixed)} must stay"
        if self.holder is not None and len(kept) < len(self.blocks):
            cut_lists(self.holder, kept, of=len(self.blocks))
        blocks = [self.blocks[i] for i in kept]
        del self.blocks[:]
        self.blocks.extend(blocks)


BY_POSITION = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")
"""Lists with an entry for each block that configurations of transformers hold, and models read by position."""


def cut_lists(holder: nn.Module, kept: Sequence[int], *, of: int) -> None:
    """Give a module a configuration of its own whose lists for ``of`` blocks are those of the blocks kept."""
    config = getattr(holder, "config", None)
    if config is None or isinstance(config, Mapping):
        return
    named: dict[str, Any] = {name: getattr(config, name, None) for name in BY_POSITION}
    lists = {name: found for name, found in named.items() if isinstance(found, list | tuple) and len(found) == of}
    if not lists:
        return
    own: Any = copy.copy(config)
    for name, found in lists.items():
        object.__setattr__(own, name, [found[i] for i in kept])
    if getattr(own, "num_hidden_layers", None) == of:
        object.__setattr__(own, "num_hidden_layers", len(kept))
    holder.config = own


class TokenBlock(ABC):
    """One call of a transformer block, taken apart, so that the tokens can change between its parts.

    The block itself is x = add_attention(x, output(attention(heads(attention_input(x))))), then
    x = add_feed_forward(x, feed_forward(feed_forward_input(x))), where attention scales by 1/sqrt(head_dim). Every
    part but the attention works on each token alone. Shapes: B batch, H heads, N tokens, D width.

    Args:
        block: the block, as it is now.
        inputs: what the model calls it with beside the tokens.
        named: the same, by name.
    """

    read_by_model: ClassVar[tuple[str, ...]] = ()
    """Children of the first block that the model itself reads too."""
    parallel: ClassVar[bool] = False
    """Whether both halves read the block's own input; then tokens can change after the second half only."""
    ahead: int = 0
    """Tokens of another kind before the others in this call; they are never merged nor dropped."""

    @abstractmethod
    def __init__(self, block: nn.Module, *inputs: Any, **named: Any) -> None: ...

    @classmethod
    def enter(cls, x: Tensor, *inputs: Any, **named: Any) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """What a model calls a block with -> all its tokens (B, N, D), and what the blocks here are made with."""
        return x, inputs, named

    @classmethod
    def leave(cls, x: Tensor, *inputs: Any, **named: Any) -> Any:
        """Tokens (B, N, D), and the same -> what a block gives."""
        return x

    def keep_positions(self, rows: Tensor) -> None:
        """From now on tokens are those of these rows of the start (B, n), where attention reads positions."""
        del rows  # it does not, unless a family says so

    @classmethod
    def mask(cls, x: Tensor, *inputs: Any, **named: Any) -> Tensor | None:
        """What to add to each key's scores for tokens (B, N, D), from the same inputs (B, 1, 1, N); None: nothing."""
        return None

    @abstractmethod
    def attention_input(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D), normed where the block norms first."""

    @abstractmethod
    def heads(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, N, head_dim)."""

    @abstractmethod
    def output(self, mixed: Tensor) -> Tensor:
        """The heads' results (B, N, H*head_dim) -> (B, N, D)."""

    @abstractmethod
    def add_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """Gate, residual, and norm where the block norms last."""

    @abstractmethod
    def feed_forward_input(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D), normed where the block norms first."""

    @abstractmethod
    def feed_forward(self, y: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""

    @abstractmethod
    def add_feed_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Gate, residual, and norm where the block norms last."""


@dataclass(frozen=True, kw_only=True)
class TokenStack:
    """All blocks of a network, through which one sequence of tokens runs.

    Args:
        holder: the module that calls the blocks in a loop, each with the same inputs beside the tokens.
        name: of the list of blocks in it.
        path: of that list, from the module that answers.
        block: how one call of a block is taken apart.
        leading: tokens at the front that are no content (class, distillation): never merged nor dropped.
        square: whether the other tokens are the patches of a picture, row by row.
        reads_all: whether the model needs all tokens at its end.
        padded: whether some tokens may be padding, as a mask says.
        joint: whether text goes along (``TokenBlock.ahead``), attended to like the others.
        level: whether it is one of several in a network that works on several resolutions.
    """

    holder: nn.Module
    name: str
    path: str
    block: type[TokenBlock]
    leading: int = 0
    square: bool = False
    reads_all: bool = False
    padded: bool = False
    joint: bool = False
    level: bool = False

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        blocks = getattr(self.holder, self.name)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def replace_blocks(self, run: nn.Module) -> None:
        """Put one module, called as a block is, in the place of all blocks. Spent afterwards: ask anew."""
        whole = nn.ModuleList([run])
        whole.training = self.blocks.training
        setattr(self.holder, self.name, whole)


@dataclass(frozen=True, kw_only=True)
class TimeEmbedding:
    """A module with a child that embeds the timestep (B, width); what is added there conditions all that reads it.

    Args:
        name: of the child.
        width: features that it gives.
    """

    name: str
    width: int


@dataclass(frozen=True)
class FixedAttention:
    """An attention layer whose heads cannot be taken out, and why: what a pass reports instead of guessing."""

    reason: str


Trait = TypeVar("Trait")


def only(trait: type[Trait], recognise: Callable[[nn.Module], object]) -> Callable[[nn.Module], Trait | None]:
    """A recogniser of one trait, from a function that may answer with any of several."""

    def answer(module: nn.Module) -> Trait | None:
        found = recognise(module)
        return found if isinstance(found, trait) else None

    return answer


@cache
def families() -> tuple[object, ...]:
    """Every module under ``passes/families``, by name."""
    names = sorted(entry.name for entry in pkgutil.iter_modules(families_folder.__path__))
    return tuple(importlib.import_module(f"enginewright.passes.families.{name}") for name in names)


def trait_of(module: nn.Module, trait: type[Trait]) -> Trait | None:
    """What the first family that knows this layer answers, or None."""
    for family in families():
        for recognise in family.RECOGNISERS.get(trait, ()):  # type: ignore[attr-defined]
            if (answer := recognise(module)) is not None:
                return answer  # type: ignore[no-any-return]
    return None


def layers_of(model: nn.Module, trait: type[Trait]) -> Iterator[tuple[str, Trait]]:
    """Each layer that has the trait, with its module path, in the model's order."""
    for path, module in model.named_modules():
        if (answer := trait_of(module, trait)) is not None:
            yield path, held(model, path, answer)


def layer_at(model: nn.Module, path: str, trait: type[Trait]) -> Trait:
    """The layer at a path that a plan names."""
    answer = trait_of(model.get_submodule(path), trait)
    assert answer is not None, f"{path} lost its trait {trait.__name__} between plan and rewrite"
    return held(model, path, answer)


def held(model: nn.Module, path: str, answer: Trait) -> Trait:
    """An answer that also knows the module around it, where that matters: a list of blocks is called by its holder."""
    if isinstance(answer, BlockStack) and path:
        return cast(Trait, replace(answer, holder=model.get_submodule(path.rpartition(".")[0])))
    return answer
