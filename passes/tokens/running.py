"""Run the blocks of a network while the number of tokens falls from one to the next, and give all of them back.

Shapes: B batch, N tokens at the start, n tokens now, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, Facts, Plan, macs
from enginewright.passes.kernel.audit import Call, disagreement, first_call, quietly, see, unlike
from enginewright.passes.kernel.observe import Look, looking
from enginewright.passes.kernel.surgery import share
from enginewright.passes.tokens.matching import rows
from enginewright.passes.traits import TokenBlock, TokenStack, layers_of


class TokenFacts(Facts):
    """The tokens of each stack."""

    tokens: dict[str, int | None] = Field(description="by its path; null: the example call never reaches it")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A stack of blocks in a model.

    Args:
        path: of the list of blocks.
        stack: what a family says of it.
        tokens: how many reach it on the example call; None: not known.
        width: of a token there; None: not known.
    """

    path: str
    stack: TokenStack
    tokens: int | None
    width: int | None

    def block(self, number: int) -> str:
        """The path of one block."""
        return f"{self.path}.{number}"


@dataclass
class Tokens:
    """The tokens on their way.

    Args:
        x: as they are now (B, n, D).
        place: for each token of the start the row that it is in now (B, N); -1 - i for row i of what was ``left``.
        size: how many tokens each stands for (B, n); None: one each.
        mask: what to add to the scores of each as a key (B, 1, 1, n); None: nothing.
        left: tokens as they were when some of them were dropped, one after the other.
        at: row of the start whose position each has now (B, n); None: its own.
    """

    x: Tensor
    place: Tensor
    size: Tensor | None = None
    mask: Tensor | None = None
    left: list[Tensor] = field(default_factory=list)
    at: Tensor | None = None

    def bias(self, *, proportional: bool) -> Tensor | None:
        """What attention adds to the scores of each key (B, 1, 1, n): the mask, and the logarithm of the size."""
        if not proportional or self.size is None:
            return self.mask
        size = self.size.log()[:, None, None]
        return size if self.mask is None else size + self.mask

    def move(self, row_of: Tensor) -> None:
        """Note where the tokens of now (B, n) are next."""
        here = row_of.gather(1, self.place.clamp(min=0))
        self.place = torch.where(self.place >= 0, here, self.place)

    def keep(self, stay: Tensor) -> None:
        """Drop all tokens but these (B, m), ascending; what is dropped stays in ``left`` as it is."""
        offset = sum(before.shape[1] for before in self.left)
        places = torch.arange(self.x.shape[1], device=stay.device)
        kept = (stay[..., None] == places).any(dim=1)  # (B, n)
        self.move(torch.where(kept, kept.long().cumsum(1) - 1, -1 - offset - places))
        self.left.append(self.x)
        self.x = rows(self.x, stay)
        if self.mask is not None:
            self.mask = self.mask[:, 0, 0].expand(kept.shape).gather(1, stay)[:, None, None]

    def add(self, x: Tensor) -> None:
        """Put a token (B, 1, D) behind the others that is none of the start."""
        self.x = torch.cat([self.x, x], dim=1)
        if self.mask is not None:
            self.mask = F.pad(self.mask, (0, 1))

    def all(self) -> Tensor:
        """Every token of the start (B, N, D), as it is now or was when it was dropped."""
        if not self.left:
            return rows(self.x, self.place)
        here = torch.where(self.place >= 0, self.place, self.x.shape[1] - 1 - self.place)
        return rows(torch.cat([self.x, *self.left], dim=1), here)


class Step(nn.Module):
    """One block, called as it is but for what happened to the tokens before.

    Args:
        block: the block.
        kind: how a call of it is taken apart.
        proportional: whether keys weigh as many as they stand for.
    """

    def __init__(self, block: nn.Module, kind: type[TokenBlock], *, proportional: bool = False) -> None:
        super().__init__()
        self.block, self.kind, self.proportional = block, kind, proportional
        self.training = block.training

    def forward(self, tokens: Tokens, inputs: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Take the tokens through the block."""
        call = self.kind(self.block, *inputs, **named)
        if tokens.at is not None:
            call.keep_positions(tokens.at)
        q, k, v = call.heads(call.attention_input(tokens.x))
        self.attend(tokens, call, q, k, v)
        if not call.parallel:
            self.between(tokens, k, call.ahead)
        self.feed(tokens, call)
        if call.parallel:
            self.between(tokens, k, call.ahead)

    def attend(self, tokens: Tokens, call: TokenBlock, q: Tensor, k: Tensor, v: Tensor) -> None:
        """The attention's half."""
        bias = tokens.bias(proportional=self.proportional)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        tokens.x = call.add_attention(tokens.x, call.output(joined(mixed)))

    def between(self, tokens: Tokens, k: Tensor, ahead: int) -> None:
        """What happens to the tokens between the halves: nothing.

        Args:
            tokens: the first ``ahead`` of them are of another kind.
            k: the attention's keys (B, H, n, head_dim).
            ahead: how many.
        """

    def feed(self, tokens: Tokens, call: TokenBlock) -> None:
        """The feed-forward's half."""
        tokens.x = call.add_feed_forward(tokens.x, call.feed_forward(call.feed_forward_input(tokens.x)))


def joined(mixed: Tensor) -> Tensor:
    """Results of heads (B, H, n, head_dim) -> (B, n, H*head_dim)."""
    return mixed.transpose(1, 2).flatten(2)


class TokenRun(nn.Module):
    """All blocks of a network in a row, called as one of them is.

    Args:
        steps: one for each block.
        restore: give as many tokens back as came in.
    """

    why_no_stack: ClassVar[str] = (
        "its blocks run as one since a pass changed their tokens; what takes blocks out goes before that pass"
    )

    def __init__(self, steps: Sequence[Step], *, restore: bool) -> None:
        super().__init__()
        self.steps, self.restore = nn.ModuleList(steps), restore
        self.training = self.steps.training = steps[0].training

    def __getattr__(self, name: str) -> Any:
        """Also what the model itself reads of its first block."""
        steps = self.__dict__["_modules"].get("steps")
        if steps is not None and len(steps) and name in steps[0].kind.read_by_model:
            return getattr(steps[0].block, name)
        return super().__getattr__(name)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What a block gives: its tokens (B, N, D), or (B, n, D) without ``restore``."""
        first: Any = self.steps[0]
        x, inputs, named = first.kind.enter(*inputs, **named)
        place = torch.ones_like(x[:, :, 0], dtype=torch.long).cumsum(1) - 1
        tokens = Tokens(x, place, mask=first.kind.mask(x, *inputs, **named))
        for step in self.steps:
            step(tokens, inputs, named)
        return first.kind.leave(tokens.all() if self.restore else tokens.x, *inputs, **named)


def arriving(model: nn.Module, stack: TokenStack, context: Context) -> tuple[int | None, int | None]:
    """How many tokens, text apart, reach the blocks on the example call, which is made, and their width.

    None without an example.
    """
    example = context.example or next(iter(context.calibration), None)
    if example is None:
        return None, None
    seen: list[tuple[int, int]] = []

    block = stack.blocks[0]

    def look(inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        x, inputs, named = stack.block.enter(*inputs, **named)
        seen.append((x.shape[1] - stack.block(block, *inputs, **named).ahead, x.shape[2]))

    with looking([Look(block, before=look)]):
        macs(model, example)  # on shapes alone where that is possible
    return seen[0] if seen else (None, None)


def token_stacks(model: nn.Module, context: Context) -> tuple[list[Found], dict[str, str]]:
    """The stacks of a model; or, where there is none, why it is left alone, by module path."""
    stacks = {stack.path_in(owner): stack for owner, stack in layers_of(model, TokenStack)}
    skipped = {path: reason for path, stack in stacks.items() if (reason := refuted(model, path, stack, context))}
    found = []
    for path, stack in stacks.items():
        if path not in skipped:
            tokens, width = arriving(model, stack, context)
            found.append(Found(path=path, stack=stack, tokens=tokens, width=width))
    none = f"no family knows how the blocks of a {type(model).__name__} run on fewer tokens"
    return found, skipped if stacks else {"": none}


def stack_at(model: nn.Module, path: str) -> TokenStack:
    """The stack whose list of blocks is at a path."""
    return next(stack for owner, stack in layers_of(model, TokenStack) if stack.path_in(owner) == path)


def refuted(model: nn.Module, path: str, stack: TokenStack, context: Context) -> str:
    """Why a stack's blocks are not those of its family, or empty: run taken apart, with no token gone, they must agree.

    First each kind of block alone, so that the reason names it, then all of them in the model.
    """
    paths = [f"{path}.{number}" for number in range(len(stack.blocks))]
    seen = see(model, paths, context)
    if seen is None or not all(each in seen.calls for each in paths):
        return ""
    blocks = dict(zip(paths, stack.blocks, strict=True))
    if reasons := unlike(seen, blocks, lambda block: TokenRun([Step(block, stack.block)], restore=True)):
        return next(iter(reasons.values()))
    twin = share(model)
    whole = stack_at(twin, path)
    whole.replace_blocks(TokenRun([Step(block, whole.block) for block in whole.blocks], restore=True))
    with quietly(twin):
        said = disagreement(seen, Call((), first_call(context) or {}, seen.calls[""][0].output), twin)
    return f"its blocks cannot run as one, as fewer tokens need: of the whole model, {said}" if said else ""


def blocks_of(found: Iterable[Found]) -> list[str]:
    """The paths of all blocks."""
    return [each.block(i) for each in found for i in range(len(each.stack.blocks))]


def replace_stacks(
    model: nn.Module, plan: Plan, step: Callable[[TokenStack, nn.Module, str], Step], *, restore: bool
) -> nn.Module:
    """Put a run in the place of each stack of which the plan names a block.

    Args:
        model: changed in place.
        plan: names blocks in its choice.
        step: makes one from stack, block and its path.
        restore: give as many tokens back as came in.
    """
    for owner, stack in list(layers_of(model, TokenStack)):
        path = stack.path_in(owner)
        if any(f"{path}.{i}" in plan.choice for i in range(len(stack.blocks))):
            steps = [step(stack, block, f"{path}.{i}") for i, block in enumerate(stack.blocks)]
            stack.replace_blocks(TokenRun(steps, restore=restore))
    return model


def refuse_lost_tokens(found: Found, *, restore: bool) -> None:
    """Tokens that are not given back must not be missed."""
    if found.stack.reads_all and not restore:
        raise ToolchainError(
            "restore is false, and this model reads every token at its end", where=found.path, help="set restore"
        )
