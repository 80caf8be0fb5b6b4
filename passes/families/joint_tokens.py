"""How the blocks of ``diffusers``' SD3 and Flux run on fewer image tokens; known by their structure.

Text stands before the image in one row of tokens, stays whole, and is attended to as before. Checked against diffusers
0.42. A second attention over the image alone (SD3.5) runs on the tokens that there are, each weighing one.

Shapes: B batch, T tokens of text, N of text and image, n of them now, H heads, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from enginewright.passes.families.joint_blocks import NORMS, OWN, TEXT, is_joint
from enginewright.passes.kernel.surgery import own_parts
from enginewright.passes.traits import RotaryAxes, TokenBlock, TokenStack

LARGEST_HALF = 65504
"""What Flux holds half precision's text and single blocks to."""

INPUTS = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb")
"""What blocks are called with, in order; SD3 has no rotary tables."""

DOUBLE = {"norm1", "norm1_context", "attn", "ff"}
SINGLE = {"norm", "attn", "proj_mlp", "act_mlp", "proj_out"}
MORE = {"attn2", "norm2", "norm2_context", "ff_context"}
"""Parts of double blocks that not all of them have, or that hold no weights."""


def modulation(norm: Any, condition: Tensor) -> list[Tensor]:
    """Parts (B, 1, D) of an adaptive norm, in its order."""
    y = norm.linear(norm.silu(condition))
    return [part[:, None] for part in y.chunk(y.shape[1] // condition.shape[1], dim=1)]


class JointBlock(TokenBlock):
    """A block that is called with image and text apart."""

    def __init__(
        self, block: nn.Module, *, ahead: int, condition: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> None:
        self.block = cast(Any, block)
        self.ahead, self.condition, self.rotary = ahead, condition, rotary

    @classmethod
    def enter(cls, *inputs: Any, **named: Any) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """Text, then image."""
        given = {**dict(zip(INPUTS, inputs, strict=False)), **named}
        assert not given.get("joint_attention_kwargs"), "masks and image prompts are not known here"
        text = given["encoder_hidden_states"]
        x = torch.cat([text, given["hidden_states"]], dim=1)
        how = {"ahead": text.shape[1], "condition": given["temb"], "rotary": given.get("image_rotary_emb")}
        return x, (), how

    @classmethod
    def leave(cls, x: Tensor, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Text and image."""
        return x[:, : named["ahead"]], x[:, named["ahead"] :]

    def keep_positions(self, rows: Tensor) -> None:
        """Each token turns by its own row (n, head_dim) of the tables."""
        if self.rotary is not None:
            cos, sin = (t.index_select(0, rows.flatten()).unflatten(0, rows.shape) for t in self.rotary)
            self.rotary = cos, sin

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Text and image."""
        return x[:, : self.ahead], x[:, self.ahead :]

    def heads(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projected, and turned by their positions."""
        q, k, v = self.unturned_heads(y)
        return self.turned(q), self.turned(k), v

    def turned(self, x: Tensor) -> Tensor:
        """Rotary positions (``apply_rotary_emb``): x (..., H, n, head_dim), neighbours in pairs."""
        if self.rotary is None:
            return x
        cos, sin = (table[..., None, :, :] for table in self.rotary)  # (1, n, head_dim), or (B, 1, n, head_dim)
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        crossed = torch.stack([-imaginary, real], dim=-1).flatten(-2)
        return (x.float() * cos + crossed.float() * sin).to(x.dtype)

    def projected(self, y: Tensor, names: tuple[str, ...], norms: tuple[str, ...]) -> list[Tensor]:
        """Queries, keys and values (B, H, n, head_dim) of tokens of one kind."""
        layer = self.block.attn
        heads = [getattr(layer, name)(y).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for name in names]
        for i, name in enumerate(norms):
            norm = getattr(layer, name, None)
            heads[i] = heads[i] if norm is None else norm(heads[i])
        return heads


class DoubleBlock(JointBlock):
    """``JointTransformerBlock`` and ``FluxTransformerBlock``: weights of their own for text and image."""

    def __init__(
        self, block: nn.Module, *, ahead: int, condition: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> None:
        super().__init__(block, ahead=ahead, condition=condition, rotary=rotary)
        self.image, self.text = (modulation(norm, condition) for norm in (self.block.norm1, self.block.norm1_context))
        self.gives_text = len(self.text) > 2
        if not self.gives_text:
            self.text.reverse()  # the continuous norm of SD3's last block has the scale first

    def attention_input(self, x: Tensor) -> Tensor:
        """Norm, scale and shift; with a second attention, what it reads is kept."""
        text, image = self.split(x)
        text, image = self.block.norm1_context.norm(text), self.block.norm1.norm(image)
        if len(self.image) > 6:
            self.second = image * (1 + self.image[7]) + self.image[6]
        return torch.cat([text * (1 + self.text[1]) + self.text[0], image * (1 + self.image[1]) + self.image[0]], dim=1)

    def unturned_heads(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From three projections for each kind."""
        text, image = self.split(y)
        both = zip(self.projected(text, TEXT, NORMS[2:]), self.projected(image, OWN, NORMS[:2]), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in both)
        return q, k, v

    def output(self, mixed: Tensor) -> Tensor:
        """The output projection of each kind; zeros for a text that is not read any more."""
        text, image = self.split(mixed)
        image = self.block.attn.to_out[1](self.block.attn.to_out[0](image))
        if self.gives_text:
            return torch.cat([self.block.attn.to_add_out(text), image], dim=1)
        return torch.cat([torch.zeros_like(text[:, :, :1]).expand(-1, -1, image.shape[-1]), image], dim=1)

    def add_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """Gate and residual; the second attention comes on top."""
        (text, image), (more_text, more_image) = self.split(x), self.split(y)
        image = image + self.image[2] * more_image
        if len(self.image) > 6:
            image = image + self.image[8] * self.block.attn2(hidden_states=self.second)
        return torch.cat([text + self.text[2] * more_text if self.gives_text else text, image], dim=1)

    def feed_forward_input(self, x: Tensor) -> Tensor:
        """Norm, scale and shift."""
        text, image = self.split(x)
        image = self.block.norm2(image) * (1 + self.image[4]) + self.image[3]
        if self.gives_text:
            text = self.block.norm2_context(text) * (1 + self.text[4]) + self.text[3]
        return torch.cat([text, image], dim=1)

    def feed_forward(self, y: Tensor) -> Tensor:
        """The feed-forward of each kind."""
        text, image = self.split(y)
        return torch.cat([self.block.ff_context(text) if self.gives_text else text, self.block.ff(image)], dim=1)

    def add_feed_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Gate and residual."""
        (text, image), (more_text, more_image) = self.split(x), self.split(y)
        if self.gives_text:
            text = held(text + self.text[5] * more_text)
        return torch.cat([text, image + self.image[5] * more_image], dim=1)


class SingleBlock(JointBlock):
    """``FluxSingleTransformerBlock``: one projection reads the heads' results and the hidden units, of every token.

    So that this projection stays whole, ``output`` hands the results on, and ``feed_forward`` gives hidden units.
    """

    parallel: ClassVar[bool] = True

    def __init__(
        self, block: nn.Module, *, ahead: int, condition: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> None:
        super().__init__(block, ahead=ahead, condition=condition, rotary=rotary)
        self.shift, self.scale, self.gate = modulation(self.block.norm, condition)

    def attention_input(self, x: Tensor) -> Tensor:
        """Norm, scale and shift, for both halves."""
        self.normed = self.block.norm.norm(x) * (1 + self.scale) + self.shift
        return self.normed

    def unturned_heads(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From three projections of all tokens."""
        q, k, v = self.projected(y, OWN, NORMS[:2])
        return q, k, v

    def output(self, mixed: Tensor) -> Tensor:
        """The heads' output as it is: one projection reads it together with the hidden units."""
        return mixed

    def add_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """Nothing yet."""
        self.mixed = y
        return x

    def feed_forward_input(self, x: Tensor) -> Tensor:
        """What attention reads too."""
        return self.normed

    def feed_forward(self, y: Tensor) -> Tensor:
        """The hidden units."""
        return self.block.act_mlp(self.block.proj_mlp(y))

    def add_feed_forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Project both, gate and residual."""
        return held(x + self.gate * self.block.proj_out(torch.cat([self.mixed, y], dim=2)))


def held(x: Tensor) -> Tensor:
    """Within the range of half precision, as Flux does it; SD3 does not, and its text stays within anyway."""
    return x.clip(-LARGEST_HALF, LARGEST_HALF) if x.dtype == torch.float16 else x


def double(block: Any) -> bool:
    """Whether a block is a double one of exactly the parts that are known here."""
    names = set(own_parts(block))
    if not DOUBLE <= names <= DOUBLE | MORE or getattr(block, "_chunk_size", None) is not None:
        return False
    layers = [block.attn, *([block.attn2] if "attn2" in names else [])]
    return all(known(layer) for layer in layers) and hasattr(block.attn, TEXT[0])


def single(block: Any) -> bool:
    """Whether a block is a single one of exactly the parts that are known here."""
    return SINGLE - {"act_mlp"} <= set(own_parts(block)) <= SINGLE and known(block.attn)


def known(layer: Any) -> bool:
    """Whether an attention has no other parts than projections and norms of heads."""
    parts = {*OWN, *TEXT, *NORMS, "to_out", "to_add_out"}
    return is_joint(layer) and set(own_parts(layer)) <= parts


@dataclass(frozen=True, kw_only=True)
class ListOfBlocks(TokenStack):
    """The list of blocks itself, because a network may have two of them; it keeps its place in the model."""

    name: str = ""
    path: str = ""

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        return cast(nn.ModuleList, self.holder)

    def replace_blocks(self, run: nn.Module) -> None:
        """Put one module in the place of all blocks. Spent afterwards: ask anew."""
        del self.blocks[:]
        self.blocks.append(run)


def stack(module: nn.Module) -> TokenStack | None:
    """A list of blocks of one kind; the networks have up to two."""
    if not isinstance(module, nn.ModuleList) or not len(module):
        return None
    kinds = {DoubleBlock: double, SingleBlock: single}
    kind = next((kind for kind, fits in kinds.items() if all(fits(block) for block in module)), None)
    return None if kind is None else ListOfBlocks(holder=module, block=kind, square=True, reads_all=True, joint=True)


def rotary_axes(module: nn.Module) -> RotaryAxes | None:
    """``FluxPosEmbed``, or what stands in its place and computes in float32."""
    theta = getattr(module, "theta", None)
    widths = getattr(module, "axes_dim", None) or getattr(module, "widths", None)
    if not isinstance(theta, int | float) or not isinstance(widths, list | tuple) or len(widths) < 2:
        return None
    return RotaryAxes(theta=float(theta), widths=tuple(widths))


RECOGNISERS = {TokenStack: (stack,), RotaryAxes: (rotary_axes,)}
