"""Drop the tokens that matter least, at a few borders between blocks.

Sources: Liang et al. 2022, arXiv:2202.07800 (EViT) for ``attention``: after a block's attention, the tokens that the
class token attends to most stay, and the rest may be fused into one, weighted by that attention. Pan et al. 2021,
arXiv:2106.12620 (IA-RED2) for ``policy``: before a group of blocks an interpreter scores every token. Departures: the
number that stays is fixed, so that shapes are; tokens that stay keep their order; without a class token, and where
there is padding, the score is the mean attention that a token receives; where the model reads all tokens at its end
(``restore``) a dropped token comes back as it was when it was dropped.
Checked against youweiliang/evit at commit 5ca95a7: a vision transformer with the same weights gives the same logits to
rounding after two borders, with a fused token and without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.ground.facts import ALL_TOKENS, INDEPENDENT_ROWS, Fact
from enginewright.ground.reading import read_tensors
from enginewright.passes.contract import Context, Decision, Facts, Pass, Plan
from enginewright.passes.kernel.surgery import share
from enginewright.passes.tokens.dropping import DropStep, Kept, KeptCount, KeptShare, PolicyStep, whole
from enginewright.passes.tokens.fitting import counted, fitted
from enginewright.passes.tokens.interpreter import interpreter
from enginewright.passes.tokens.maps import token_maps
from enginewright.passes.tokens.running import (
    Found,
    Step,
    TokenFacts,
    blocks_of,
    refuse_lost_tokens,
    replace_stacks,
    token_stacks,
)
from enginewright.passes.traits import TokenStack


class PrunedFacts(TokenFacts):
    """The tokens of each stack; by a stack's path, what its interpreters were fitted on."""

    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, dict[str, int]]


class PruneTokens(Pass):
    """Keep the same number of tokens of every input; [CLS] and its like always stay."""

    by_layer: ClassVar[bool] = False
    requires: ClassVar[tuple[Fact, ...]] = (ALL_TOKENS, INDEPENDENT_ROWS)
    destroys: ClassVar[tuple[Fact, ...]] = (ALL_TOKENS,)
    decisions: ClassVar[tuple[type[Decision], ...]] = (KeptShare, KeptCount)
    facts: ClassVar[type[Facts]] = PrunedFacts

    method: Literal["attention", "policy"] = Field(
        "attention", description="score by the block's own attention (EViT), or by an interpreter (IA-RED2)"
    )
    keep: float = Field(
        0.7, gt=0, le=1, description="share kept at each border of those there: attention rounds up, policy down"
    )
    borders: tuple[int, ...] | None = Field(
        None,
        description="blocks, from 0, in (attention) or before (policy) which tokens are dropped; "
        "None: at quarters of the depth (attention), or thirds (policy)",
    )
    counts: tuple[int, ...] | None = Field(None, description="tokens kept at each border, instead of keep")
    quantile: float | None = Field(
        None,
        gt=0,
        le=1,
        description="policy: keep as many as this share of the calibration inputs needs for all scores above 0.5",
    )
    weights: str = Field(
        "",
        description="policy: safetensors file of trained interpreters, BLOCK.interpreter.weight (heads, width) and "
        ".bias for each border; empty: they are fitted to the calibration inputs",
    )
    score: Literal["auto", "class", "received"] = Field(
        "auto",
        description="attention of the class token, or the mean that a token receives; auto: class, if there is one",
    )
    fuse: bool = Field(False, description="attention: add one token for those that were dropped")
    restore: bool = Field(
        True, description="give the model all tokens back at its end; false where it reads leading tokens only"
    )

    def moved(self, path: Callable[[str], str], model: Callable[[str], str]) -> Self:
        """This pass as a recipe in another folder names its files and models."""
        del model
        return self.model_copy(update={"weights": path(self.weights)}) if self.weights else self

    def plan(self, model: nn.Module, context: Context) -> Plan[Kept]:
        """How many stay at each border; for ``policy`` also the interpreters: trained ones, or a start for them.

        The facts show which tokens of a few inputs stay (``maps``, passes/tokens/maps.py).

        Raises ``ToolchainError`` for borders that a stack does not have, counts that do not fit them, and parameters
        that need another method or inputs that are not there; and for a file of interpreters that do not fit.
        """
        self.refuse(context)
        stacks, skipped = token_stacks(model, context)
        choice: dict[str, Kept] = {}
        arrays: dict[str, Tensor] = {}
        told: dict[str, Any] = {"tokens": {found.path: found.tokens for found in stacks}}
        for found in stacks:
            if found.stack.joint:
                skipped |= dict.fromkeys(
                    blocks_of([found]), "its tokens attend to text too, which no score here counts"
                )
                continue
            refuse_lost_tokens(found, restore=self.restore)
            if self.score == "class" and not found.stack.leading:
                raise ToolchainError("score is 'class', and this model has no class token", where=found.path)
            entries = self.entries(found, skipped)
            if self.method == "policy" and entries:
                borders = list(entries)
                learned = self.trained(found, borders, context) or fitted(model, found, borders, context)
                told[found.path] = {"calibration_calls": len(context.calibration)}
                if self.quantile is not None:
                    counts = counted(model, found, borders, context, learned, quantile=self.quantile)
                    entries |= {border: KeptCount(count=count) for border, count in zip(borders, counts, strict=True)}
                arrays |= learned
            choice |= {found.block(border): kept for border, kept in entries.items()}
        plan = Plan(choice=choice, skipped=skipped, facts=PrunedFacts(**told), arrays=arrays)
        if choice and len(stacks) == 1:
            pruned = self.rewrite(share(model), plan)
            maps = token_maps(pruned, context, leading=stacks[0].stack.leading)
            return replace(plan, facts=plan.facts.model_copy(update={"maps": tuple(maps)}))
        return plan

    def refuse(self, context: Context) -> None:
        """Parameters that do not go together."""
        if self.method == "policy" and (not self.weights or self.quantile is not None):
            self.check_calibration(context, "method 'policy'", otherwise="take method = 'attention'")
        if self.weights and self.method != "policy":
            raise ToolchainError("weights are of interpreters, which method 'policy' has", help="leave weights out")
        if self.method == "policy" and self.fuse:
            raise ToolchainError("fuse weighs by attention; method 'policy' has none", help="leave fuse out")
        if self.quantile is not None and (self.method != "policy" or self.counts is not None):
            raise ToolchainError("quantile is for method 'policy' without counts", help="leave quantile out")
        if self.counts is not None and (self.borders is None or len(self.counts) != len(self.borders)):
            raise ToolchainError(f"counts {self.counts} need as many borders; borders is {self.borders}")

    def trained(self, found: Found, borders: Sequence[int], context: Context) -> dict[str, Tensor]:
        """The interpreters of the file, by their names in a plan; none without a file.

        Raises:
            ToolchainError: it has none for a border, or one of another form.
        """
        if not self.weights:
            return {}
        where = str(context.folder / self.weights)
        known = read_tensors(context.folder / self.weights, what="the file of interpreters")
        arrays: dict[str, Tensor] = {}
        for border in borders:
            path = f"{found.block(border)}.interpreter"
            names = (f"{path}.weight", f"{path}.bias")
            if missing := [name for name in names if name not in known]:
                listed = ", ".join(sorted(known)[:8])
                raise ToolchainError(f"there is no {missing[0]!r} in it", where=where, help=f"it has {listed}")
            weight, bias = (known[name] for name in names)
            width = found.width or weight.shape[-1]
            if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
                shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
                raise ToolchainError(f"{path} has {shapes}; wanted (heads, {width}) and (heads,)", where=where)
            arrays |= dict(zip(names, (weight, bias), strict=True))
        return arrays

    def borders_of(self, found: Found) -> tuple[int, ...]:
        """Block numbers, ascending."""
        blocks = len(found.stack.blocks)
        if self.borders is None:
            parts = (
                [blocks * i // 4 for i in (1, 2, 3)]
                if self.method == "attention"
                else [blocks * i // 3 for i in (0, 1, 2)]
            )
            return tuple(sorted(set(parts)))
        wrong = [border for border in self.borders if not 0 <= border < blocks]
        if wrong or list(self.borders) != sorted(set(self.borders)):
            raise ToolchainError(
                f"borders are {self.borders}; they must rise, from 0 to at most {blocks - 1}", where=found.path
            )
        return self.borders

    def entries(self, found: Found, skipped: dict[str, str]) -> dict[int, Kept]:
        """What is kept at each border; a block where nothing is dropped is among those left alone."""
        borders, chosen = self.borders_of(found), dict[int, Kept]()
        tokens = None if found.tokens is None else found.tokens - found.stack.leading
        for number in range(len(found.stack.blocks)):
            if number not in borders:
                skipped[found.block(number)] = "no border: it runs on the tokens that it gets"
                continue
            count = self.counts[borders.index(number)] if self.counts else None
            kept: Kept = KeptShare(keep=self.keep) if count is None else KeptCount(count=count)
            left = None if tokens is None else whole(kept, tokens, up=self.method == "attention")
            if self.keep == 1 and count is None and self.quantile is None:
                skipped[found.block(number)] = "keep is 1: nothing is dropped"
            elif tokens is not None and left == tokens and self.quantile is None:
                skipped[found.block(number)] = f"all its {tokens} tokens stay"
            else:
                chosen[number] = kept
                tokens = left if left is None or not self.fuse else left + 1
        return chosen

    def rewrite(self, model: nn.Module, plan: Plan[Kept]) -> nn.Module:
        """Put a run of all blocks in the place of each stack with a border."""

        def step(stack: TokenStack, block: nn.Module, path: str) -> Step:
            kept = plan.choice.get(path)
            if kept is None:
                return Step(block, stack.block)
            if self.method == "policy":
                weight, bias = (plan.array(f"{path}.interpreter.{name}") for name in ("weight", "bias"))
                like = next(block.parameters())
                return PolicyStep(block, stack.block, interpreter(weight, bias, like), kept=kept, leading=stack.leading)
            received = self.score == "received" or (self.score == "auto" and (not stack.leading or stack.padded))
            return DropStep(block, stack.block, kept=kept, leading=stack.leading, received=received, fuse=self.fuse)

        return replace_stacks(model, plan, step, restore=self.restore)
