"""What a pass may ask of a model, whatever its class: traits, and the families that answer for their layers.

A family is one file under ``passes/families/`` with a function ``recognise(module) -> Trait | None`` for each trait
it knows (named in its ``RECOGNISERS``). Our own models, and yours if you like, declare what their layers are by the
base classes below (``FusedAttention``, ``PlainFeedForward``, ``StreamBlock``, …); layers of other libraries are known
by their structure, and no model library is imported.
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


class DeclaredAttention:
    """Declared by an attention layer, by one of the three forms below; its ``forward`` is made of parts named there.

    What else the layer holds may depend on its heads; then they stay, and the reason names it, unless the class says
    how. Shapes: B batch, N tokens, D width, H heads, E = ``head_dim`` width of a head.
    """

    writers: ClassVar[Mapping[str, int]]
    """Names of the projections that write queries, keys and values, and how many of the three each does.

    Head h owns E rows for each, after those of the heads before it; one kind follows the other."""
    reader: ClassVar[str]
    """Name of the projection that reads the heads' results."""
    crossed: ClassVar[bool] = False
    """Whether keys and values are of other tokens than the queries, or of more."""
    by_head: ClassVar[tuple[str, ...]] = ()
    """Names of its parameters that have an entry for each head, along the first axis."""
    kept_whole: ClassVar[tuple[str, ...]] = ()
    """Names of parts that stay whole when heads go: they treat all alike, such as a norm of queries, or see none."""
    heads: int
    head_dim: int


class FusedAttention(DeclaredAttention):
    """``qkv`` writes all queries, then all keys, then all values, head after head; ``proj`` reads the heads."""

    writers: ClassVar[Mapping[str, int]] = {"qkv": 3}
    reader = "proj"
    qkv: nn.Linear
    proj: nn.Linear

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, D) -> queries, keys and values, each (B, H, N, E)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def join_heads(self, y: Tensor) -> Tensor:
        """What the heads give, (B, H, N, E) -> (B, N, D)."""
        return self.proj(y.transpose(1, 2).flatten(2))


class SplitAttention(DeclaredAttention):
    """``q_proj``, ``k_proj`` and ``v_proj`` write queries, keys and values, head after head; ``o_proj`` reads them."""

    writers: ClassVar[Mapping[str, int]] = {"q_proj": 1, "k_proj": 1, "v_proj": 1}
    reader = "o_proj"
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, D) -> queries, keys and values, each (B, H, N, E)."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v

    def join_heads(self, y: Tensor) -> Tensor:
        """What the heads give, (B, H, N, E) -> (B, N, D)."""
        return self.o_proj(y.transpose(1, 2).flatten(2))


class CrossAttention(DeclaredAttention):
    """``q`` writes the queries of tokens; ``kv`` all keys, then all values, of a source; ``proj`` reads the heads."""

    writers: ClassVar[Mapping[str, int]] = {"q": 1, "kv": 2}
    reader = "proj"
    crossed = True
    q: nn.Linear
    kv: nn.Linear
    proj: nn.Linear

    def heads_of(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, N, D) and a source (B, N', D') -> queries (B, H, N, E), keys and values (B, H, N', E)."""
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        k, v = self.kv(source).unflatten(-1, (2, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def join_heads(self, y: Tensor) -> Tensor:
        """What the heads give, (B, H, N, E) -> (B, N, D)."""
        return self.proj(y.transpose(1, 2).flatten(2))


class DeclaredFeedForward:
    """Declared by a feed-forward, by one of the two forms below, which say what its ``forward`` computes."""

    writers: ClassVar[tuple[str, ...]]
    """Names of the projections that write the hidden units."""
    reader: ClassVar[str]
    """Name of the projection that reads them."""


class PlainFeedForward(DeclaredFeedForward):
    """``fc2(act(fc1(x)))``, where ``act`` works on each hidden unit alone."""

    writers = ("fc1",)
    reader = "fc2"
    fc1: nn.Linear
    act: nn.Module
    fc2: nn.Linear


class GatedFeedForward(DeclaredFeedForward):
    """``down_proj(a(gate_proj(x)) * up_proj(x))``, where the activation a works on each hidden unit alone."""

    writers = ("gate_proj", "up_proj")
    reader = "down_proj"
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear


class PlainBlock(StreamBlock):
    """Declared by a block of two halves, each a residual: x = x + attn(norm1(x)), then x = x + mlp(norm2(x))."""

    norm1: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module


class ModulatedBlock(StreamBlock, ABC):
    """Declared by a block of two halves, each with a shift, a scale and a gate from one condition c (B, D).

    With the six that ``modulation`` gives, its ``forward`` is x = x + gate * attn(norm1(x) * (1 + scale) + shift), then
    the same with ``norm2`` and ``mlp``.
    """

    norm1: nn.Module
    attn: nn.Module
    norm2: nn.Module
    mlp: nn.Module

    @abstractmethod
    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """c (B, D) -> shift, scale and gate of the attention, then of the MLP, each (B, 1, D)."""


class SelectingBlock(ModulatedBlock):
    """Declared by a ``ModulatedBlock`` whose own router tells which tokens run the second half: 1 or 0 for each.

    That half is x = x + token_selection(x) * gate * mlp(norm2(x) * (1 + scale) + shift).
    """

    token_selection: nn.Module

    @abstractmethod
    def token_logits(self, x: Tensor) -> Tensor:
        """Tokens before the second half (B, N, D) -> (B, N), above 0 where it runs."""


class AdaptedLayer(ABC):
    """Declared by a linear layer that holds low-rank products beside it.

    Attributes:
        base: the layer without them.
        part: which of the network's adapters they belong to, such as ``content``.
        branches: names of its products, where a gate mixes several; else empty.
        mixed_by: why such a mix goes into no weight, in words.
    """

    base: nn.Linear
    part: str
    branches: ClassVar[tuple[str, ...]] = ()
    mixed_by: ClassVar[str] = ""

    @abstractmethod
    def merged(self, branch: str = "") -> nn.Linear:
        """The linear layer that computes the same; of a mix, the same as with this branch alone."""

    def held_at(self, branch: str) -> nn.Module:
        """The layer with one branch in the place of its mix, unmerged. Raises ``NotImplementedError`` where none is."""
        raise NotImplementedError(f"{type(self).__name__} has no branch {branch!r}")


class RoutedWidth(ABC):
    """Declared by a network whose routers tell, by the timestep alone, which heads and groups of hidden units run.

    Shapes: T timesteps, U units of a layer (heads; groups of neighbouring hidden units).
    """

    @abstractmethod
    def width_masks(self, t: Tensor) -> dict[str, Tensor]:
        """Timesteps (T,) -> masks (T, U) of 0 and 1, by the layer's path in what ``whole_width`` gives."""

    @abstractmethod
    def whole_width(self) -> nn.Module:
        """The network without these routers, called alike: all units of all layers run. It shares the weights."""


class PatchNetwork:
    """Declared by a network that takes the patches of a square picture, row by row, through its ``blocks``.

    They are called one after the other, with one condition where they are modulated. Of what comes out of the last,
    all patches are read; where tokens lead them, such as a class token, those alone.
    """

    blocks: nn.ModuleList
    leading: ClassVar[int] = 0
    """Tokens before the patches."""


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
    routed: ClassVar[bool] = False
    """Whether the block has a router of its own, and ``add_feed_forward`` leaves a token as it is where that router's
    logit is not above 0."""
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

    def token_logits(self, x: Tensor) -> Tensor:
        """What the block's own router says of tokens (B, N, D) between the halves (B, N), where it is ``routed``."""
        raise NotImplementedError(f"{type(self.block).__name__} has no router")  # type: ignore[attr-defined]

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

    def unturned_heads(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same before rotary positions turn queries and keys, as ``turned`` does."""
        return self.heads(y)

    def values(self, y: Tensor) -> Tensor:
        """The values alone, where queries and keys are not needed (B, H, N, head_dim)."""
        return self.unturned_heads(y)[2]

    def turned(self, x: Tensor) -> Tensor:
        """Queries or keys (..., H, N, head_dim), each as its position turns it."""
        return x

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

    def path_in(self, owner: str) -> str:
        """The path of the list of blocks in a model whose module at ``owner`` answered."""
        return f"{owner}.{self.path}".strip(".")

    def replace_blocks(self, run: nn.Module) -> None:
        """Put one module, called as a block is, in the place of all blocks. Spent afterwards: ask anew."""
        whole = nn.ModuleList([run])
        whole.training = self.blocks.training
        setattr(self.holder, self.name, whole)


@dataclass(frozen=True, kw_only=True)
class RotaryAxes:
    """A module that turns positions along several axes into angles: feature pair j of an axis by p / theta^(2j/width).

    Args:
        theta: the slowest wave.
        widths: features that each axis turns, one axis after the other; the last two are rows and columns.
    """

    theta: float
    widths: tuple[int, ...]


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
