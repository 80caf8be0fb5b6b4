"""TNT: a classifier of images whose patches are also a few words each, which a small transformer relates.

Source: Han et al. 2021, arXiv:2103.00112, section 2. Checked against huawei-noah/Efficient-AI-Backbones at commit
f90e129: parameter counts, order of operations, and outputs with the same weights (equal to 2e-15 in float64). What
differs from it:

* An image is cut into patches by a reshape, which moves the same pixels as the release's ``nn.Unfold``.
* Queries, keys and values are one projection, where the release has one for queries and keys and one for values.
* What the words of each patch say is added to the patches' tokens and the class token joined again, not added in place.
* The last norm reads the class token alone. A constant of the release that nothing reads, ``outer_tokens``, is left
  out: 75,264 numbers of size S, 125,440 of size B.
* Dropout, stochastic depth and squeeze-and-excitation, which no published size uses when it runs, are left out.

Shapes: B batch, S side of an image, P side of a patch, N patches, D width of a patch's token, W words of a patch, E
width of a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from enginewright.ground.signature import Dim, InputSpec
from enginewright.models.blocks.transformer import Block, start_small
from enginewright.sources.contract import Published


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of TNT.

    Args:
        word_width: width of a word.
        word_heads: heads of attention among the words of a patch.
        width: width of a patch.
        heads: heads of attention among patches.
        depth: blocks.
        side: side of the image in pixels.
        patch: side of a patch in pixels.
        stride: pixels from word to word.
        classes: logits.
        mlp_ratio: hidden width of an MLP in widths of what it reads.
    """

    word_width: int
    word_heads: int
    width: int
    heads: int
    depth: int = 12
    side: int = 224
    patch: int = 16
    stride: int = 4
    classes: int = 1000
    mlp_ratio: int = 4

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.side // self.patch) ** 2

    @property
    def words(self) -> int:
        """Words of a patch."""
        return (self.patch // self.stride) ** 2


PUBLISHED = {
    # From memory, and not in the release. Its counts come out as published, but do not depend on its heads.
    "Ti": Config(word_width=12, word_heads=2, width=192, heads=3),
    "S": Config(word_width=24, word_heads=4, width=384, heads=6),
    "B": Config(word_width=40, word_heads=4, width=640, heads=10),
}
SHIPPED: dict[str, Config] = {}
TINY = Config(word_width=12, word_heads=2, width=32, heads=4, depth=2, side=48, classes=10)
OUTPUTS = ("logits",)
FIGURES = {
    size: (
        Published(figure="parameter_count", value=count, source=source),
        Published(figure="macs", value=macs, source=f"{source}; its FLOPs are multiply-accumulates"),
    )
    for size, count, macs, source in (
        ("Ti", "6.1 M", "1.4 G", "arXiv:2103.00112, from memory"),
        ("S", "23.8 M", "5.2 G", "huawei-noah/Efficient-AI-Backbones, tnt_pytorch/readme.md"),
        ("B", "65.6 M", "14.1 G", "huawei-noah/Efficient-AI-Backbones, tnt_pytorch/readme.md"),
    )
}


class Words(nn.Module):
    """Cut an image into patches, and each patch into words that see no pixel of another patch."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patch, self.across = config.patch, config.side // config.patch
        self.proj = nn.Conv2d(3, config.word_width, 7, stride=config.stride, padding=3)
        self.position = nn.Parameter(torch.zeros(1, config.words, config.word_width))

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, S, S) -> (B*N, W, E)."""
        cells = image.view(-1, 3, self.across, self.patch, self.across, self.patch)  # (B, 3, S/P, P, S/P, P)
        patches = cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # (B*N, 3, P, P)
        return self.proj(patches).flatten(2).transpose(1, 2) + self.position


class Sentence(nn.Module):
    """Sum up the words of each patch in a token of the patch's width."""

    def __init__(self, config: Config, *, bias: bool) -> None:
        super().__init__()
        self.patches, self.length = config.patches, config.words * config.word_width
        self.norm1 = nn.LayerNorm(self.length)
        self.proj = nn.Linear(self.length, config.width, bias=bias)
        self.norm2 = nn.LayerNorm(config.width)

    def forward(self, words: Tensor) -> Tensor:
        """words (B*N, W, E) -> (B, N, D)."""
        return self.norm2(self.proj(self.norm1(words.reshape(-1, self.patches, self.length))))


class TntBlock(nn.Module):
    """A layer among the words of each patch, whose sum goes to the patch's token, and a layer among all tokens."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.inner = Block(config.word_width, config.word_heads, config.mlp_ratio, qkv_bias=False)
        self.sentence = Sentence(config, bias=False)
        self.outer = Block(config.width, config.heads, config.mlp_ratio, qkv_bias=False)

    def forward(self, words: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """words (B*N, W, E), tokens (B, 1+N, D) -> the same; the class token is told nothing by words."""
        words = self.inner(words)
        tokens = torch.cat([tokens[:, :1], tokens[:, 1:] + self.sentence(words)], dim=1)
        return words, self.outer(tokens)


class TNT(nn.Module):
    """Tell the class of an image."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.words = Words(config)
        self.sentence = Sentence(config, bias=True)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position = nn.Parameter(torch.zeros(1, 1 + config.patches, config.width))
        self.blocks = nn.ModuleList(TntBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)
        self.initialize()

    def initialize(self) -> None:
        """The authors' start: small linears and positions."""
        self.apply(start_small)
        for table in (self.words.position, self.class_token, self.position):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, image: Tensor) -> Tensor:
        """image (B, 3, S, S) -> logits (B, classes)."""
        words = self.words(image)  # (B*N, W, E)
        # A copy for each image: an expanded view of a parameter asks for gradients even where none are wanted.
        class_token = self.class_token.repeat(image.shape[0], 1, 1)
        tokens = torch.cat([class_token, self.sentence(words)], dim=1) + self.position  # (B, 1+N, D)
        for block in self.blocks:
            words, tokens = block(words, tokens)
        return self.head(self.norm(tokens[:, 0]))


RENAMED = {
    r"^patch_embed\.": "words.",
    r"^inner_pos$": "words.position",
    r"^outer_pos$": "position",
    r"^cls_token$": "class_token",
    r"(^|\d\.)proj_norm": r"\1sentence.norm",
    r"(^|\d\.)proj\.": r"\1sentence.proj.",
    r"\.(inner|outer)_": r".\1.",
    r"\.qk\.": ".qkv.",
}
"""Parts of names in the release, as patterns, and what they are here."""


def from_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an authors' checkpoint by the names and in the shapes that they have here."""
    found = {}
    for name, tensor in state.items():
        if name == "outer_tokens" or name.endswith("attn.v.weight"):
            continue
        if name.endswith(".qk.weight"):
            tensor = torch.cat([tensor, state[name.replace(".qk.", ".v.")]])
        for theirs, ours in RENAMED.items():
            name = re.sub(theirs, ours, name)
        found[name] = tensor
    return found


def build(config: Config) -> TNT:
    """The network with the authors' start."""
    return TNT(config)


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """Images with values of about unit variance: (pixels in [0, 1] - 0.5) / 0.5."""
    batch = Dim(name="batch", low=1, typical=2, high=64)
    return (InputSpec(name="image", role="sample", shape=(batch, 3, config.side, config.side)),)
