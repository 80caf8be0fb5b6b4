"""StyleSwin: a style-based generator of pictures with Swin windows, plain and shifted side by side, for convolutions.

Source: Zhang et al. 2021, arXiv:2112.10762, section 3. Checked against microsoft/StyleSwin at commit a7c28b3: parameter
counts, order of operations, and outputs with the same weights (equal to 5e-11 in float64). What differs from it:

* Layers whose weights the release scales by a constant in every call (the mapping network, and the linears that turn a
  style into scale and offset) hold the product: load ``weight * scale`` and ``bias * lr_mul``.
* Of the masks of shifted windows, one for each window there, only four are distinct. They are made of region numbers
  when the network runs, and the windows are attended to in four groups, so that no mask is kept for each window.
* The grid of positions is kept as one table for both axes, and computed in float64, not float32: 5e-6 apart at most.
* The position biases of both halves of the heads are one table, a row for each head; the release has two.
* The 1x1 convolution to RGB is a linear layer on tokens. It keeps the release's two biases, which add up to one.

Shapes: B batch, L width of a latent, S side of a map, C its channels, H heads, d = C/H, w side of a window, V = w*w,
and a map of Y x X windows; R side of the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.ground.program import Network, in_turn
from enginewright.ground.signature import Dim, InputSpec
from enginewright.models.blocks.transformer import Mlp, bias_by_distance, start_small
from enginewright.passes.networks import Networks
from enginewright.passes.traits import FusedAttention
from enginewright.sources.contract import Published


@dataclass(frozen=True, kw_only=True)
class Config:
    """A size of StyleSwin: one stage for each of ``widths``, on maps of side 4, 8, 16 and so on.

    Args:
        widths: channels of each stage.
        window: side of an attention window; a smaller map is one window.
        latent: width of the latents z and w.
        mapping_layers: linear layers from z to w.
        mlp_ratio: hidden width of a block's MLP, in widths of its stage.
        psi: truncation; 1 leaves a style as it is, 0 replaces it by the mean style.
    """

    widths: tuple[int, ...]
    window: int = 8
    latent: int = 512
    mapping_layers: int = 8
    mlp_ratio: int = 4
    psi: float = 1.0

    @property
    def side(self) -> int:
        """The side of the picture."""
        return 2 ** (len(self.widths) + 1)

    @property
    def latents(self) -> int:
        """The latents of one picture: one for each block, two blocks for each stage."""
        return 2 * len(self.widths)


PUBLISHED = {
    "256": Config(widths=(512, 512, 512, 512, 512, 256, 128)),
    "1024": Config(widths=(512, 512, 512, 512, 256, 128, 64, 32, 16)),
}
SHIPPED: dict[str, Config] = {}
TINY = Config(widths=(32, 32, 16), window=4, latent=32, mapping_layers=2)
OUTPUTS = ("image",)
BATCH = Dim(name="batch", low=1, typical=2, high=16)
FIGURES = {
    "1024": (
        Published(figure="parameter_count", value="40.86 M", source="arXiv:2112.10762, table 6"),
        # The authors' own correction is 46.44 G (issue 15 of their repository), by code that counts half of attention's
        # linear layers. All products, and nothing else, are 52.48 G.
        Published(figure="macs", value="50.90 G", source="arXiv:2112.10762, table 6"),
    )
}


class Mapping(nn.Module):
    """Turn a latent z (B, L) into the styles of all blocks, one for all, pulled towards the mean by the truncation."""

    w_mean: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.psi, self.latents = config.psi, config.latents
        self.layers = nn.ModuleList(nn.Linear(config.latent, config.latent) for _ in range(config.mapping_layers))
        self.register_buffer("w_mean", torch.zeros(config.latent))
        for layer in self.layers:
            start_scaled(layer)

    def style(self, z: Tensor) -> Tensor:
        """z (B, L) -> w (B, L), not truncated."""
        w = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
        for layer in self.layers:
            w = math.sqrt(2) * F.leaky_relu(layer(w), 0.2)
        return w

    @torch.no_grad()
    def measure_mean(self, z: Tensor) -> None:
        """Set the mean style to that of many latents z (B, L), drawn from a standard normal distribution."""
        self.w_mean.copy_(self.style(z).mean(0))

    def forward(self, z: Tensor) -> Tensor:
        """z (B, L) -> ws (B, latents, L)."""
        w = self.psi * self.style(z) + (1 - self.psi) * self.w_mean
        return w[:, None].expand(-1, self.latents, -1)


class AdaptiveInstanceNorm(nn.Module):
    """Normalise each channel over all tokens, then scale and offset it as the style says."""

    def __init__(self, width: int, latent: int) -> None:
        super().__init__()
        self.style = nn.Linear(latent, 2 * width)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, S*S, C), w (B, L) -> (B, S*S, C)."""
        scale, offset = self.style(w)[:, None].chunk(2, dim=2)  # each (B, 1, C)
        centred = x.float() - x.float().mean(1, keepdim=True)  # in float32: half precision cannot sum a million tokens
        normed = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-5)
        return scale * normed.to(x.dtype) + offset


def attend(qkv: Tensor, bias: Tensor) -> Tensor:
    """Attention within each window: qkv (3, B, Y, X, H, V, d) and bias (H, V, V) -> (B, Y, X, H, V, d)."""
    q, k, v = qkv.flatten(1, 3).unbind(0)  # each (B*Y*X, H, V, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]).view(qkv.shape[1:])


def regions_of_windows(window: int, shift: int) -> Tensor:
    """The regions of a shifted map that meet in one window: (2, 2, V); the first two say: last row, last column.

    Rolling the map brings its first rows below its last ones, and likewise for columns. Only windows of the last row
    and of the last column hold such strangers.
    """
    wrapped = (torch.arange(window) >= window - shift).long()  # (w,)
    last = torch.arange(2)
    rows = 2 * last[:, None, None, None] * wrapped[:, None]  # (2, 1, w, 1)
    columns = last[:, None, None] * wrapped  # (2, 1, w)
    return (rows + columns).flatten(2)  # (2, 2, V)


class DoubleAttention(nn.Module, FusedAttention):
    """Attention within windows: the first half of the heads has plain windows, the other half shifted ones.

    The windows of a map that is no larger than one are never shifted: all heads then attend to the whole map.
    """

    regions: Tensor
    distance: Tensor

    def __init__(self, width: int, side: int, window: int) -> None:
        super().__init__()
        self.side, self.window = side, min(side, window)
        self.shift = window // 2 if side > window else 0
        self.heads = max(width // 32, 4)
        self.head_dim = width // self.heads
        self.qkv = nn.Linear(width, 3 * self.heads * self.head_dim)
        self.proj = nn.Linear(self.heads * self.head_dim, width)
        self.bias = nn.Parameter(torch.zeros(self.heads, 2 * self.window - 1, 2 * self.window - 1))
        place = torch.arange(self.window)
        self.register_buffer("distance", place[:, None] - place + self.window - 1, persistent=False)  # (w, w)
        self.register_buffer("regions", regions_of_windows(self.window, self.shift), persistent=False)

    def position_bias(self) -> Tensor:
        """What each head adds to a query and a key by their distance in rows and columns: (H, V, V)."""
        return bias_by_distance(self.bias, self.distance)

    def cut(self, qkv: Tensor) -> Tensor:
        """Cut a map into windows: (B, S, S, 3, H, d) -> (3, B, Y, X, H, V, d)."""
        windows, w = self.side // self.window, self.window
        cells = qkv.reshape(-1, windows, w, windows, w, *qkv.shape[3:])  # (B, Y, w, X, w, 3, H, d)
        return cells.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6)

    def join(self, windows: Tensor) -> Tensor:
        """Lay windows out as a map: (B, Y, X, H, V, d) -> (B, S, S, H, d)."""
        cells = windows.unflatten(4, (self.window, self.window)).permute(0, 1, 4, 2, 5, 3, 6)  # (B, Y, w, X, w, H, d)
        return cells.flatten(3, 4).flatten(1, 2)

    def attend_shifted(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """Attention within the windows of a rolled map, each of its regions apart; shapes as in :func:`attend`."""
        strangers = self.regions[..., None] != self.regions[..., None, :]  # (2, 2, V, V)
        bias = bias - 100.0 * strangers[:, :, None].to(bias.dtype)  # (2, 2, H, V, V)
        bands = []
        for at_last_row, rows in enumerate((slice(None, -1), slice(-1, None))):
            inner = attend(qkv[:, :, rows, :-1], bias[at_last_row, 0])
            outer = attend(qkv[:, :, rows, -1:], bias[at_last_row, 1])
            bands.append(torch.cat([inner, outer], dim=2))
        return torch.cat(bands, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S*S, C) -> (B, S*S, C)."""
        qkv = self.qkv(x).view(-1, self.side, self.side, 3, self.heads, self.head_dim)
        bias = self.position_bias()
        if self.shift:
            half, shift = self.heads // 2, self.shift
            plain = self.join(attend(self.cut(qkv[..., :half, :]), bias[:half]))  # (B, S, S, H/2, d)
            rolled = qkv[..., half:, :].roll((-shift, -shift), (1, 2))
            shifted = self.join(self.attend_shifted(self.cut(rolled), bias[half:])).roll((shift, shift), (1, 2))
            y = torch.cat([plain, shifted], dim=3)
        else:
            y = self.join(attend(self.cut(qkv), bias))
        return self.proj(y.flatten(3, 4).flatten(1, 2))


class Block(nn.Module):
    """Double attention and an MLP, each after a norm that one style sets."""

    def __init__(self, config: Config, width: int, side: int) -> None:
        super().__init__()
        self.norm1 = AdaptiveInstanceNorm(width, config.latent)
        self.attn = DoubleAttention(width, side, config.window)
        self.norm2 = AdaptiveInstanceNorm(width, config.latent)
        self.mlp = Mlp(width, config.mlp_ratio * width, approximate="none")

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, S*S, C), w (B, L) -> (B, S*S, C)."""
        x = x + self.attn(self.norm1(x, w))
        return x + self.mlp(self.norm2(x, w))


def position_code(width: int, side: int) -> Tensor:
    """Sines, then cosines, of the places 1 to ``side`` on one axis -> (side, width)."""
    rate = torch.arange(width // 2, dtype=torch.float64) / (width // 2 - 1)
    angle = torch.arange(1, side + 1, dtype=torch.float64)[:, None] / 10000**rate  # (side, width/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


class Upsample(nn.Module):
    """Double a map's side, change its width, and add a code of each token's column and row."""

    code: Tensor

    def __init__(self, width: int, out: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(width)
        self.reduction = nn.Linear(width, out, bias=False)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.register_buffer("code", position_code(out // 2, 2 * side), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S*S, C) -> (B, 4*S*S, C'); the first half of the channels codes the column, the other the row."""
        x = x.transpose(1, 2).unflatten(2, (self.side, self.side))  # (B, C, S, S)
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
        half = self.code.shape[1]
        columns, rows = F.pad(self.code, (0, half)), F.pad(self.code, (half, 0))[:, None]  # (2S, C'), (2S, 1, C')
        x = self.reduction(self.norm(x)) + self.alpha * columns + self.alpha * rows  # (B, 2S, 2S, C')
        return x.flatten(1, 2)


class ToRGB(nn.Module):
    """Read colours from tokens and add them to the picture so far, which is doubled first where it is smaller."""

    fir: Tensor

    def __init__(self, width: int, side: int, *, doubles: bool) -> None:
        super().__init__()
        self.side, self.doubles = side, doubles
        self.linear = nn.Linear(width, 3)
        self.offset = nn.Parameter(torch.zeros(3))
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
        self.register_buffer("fir", torch.outer(line, line).expand(3, 1, 4, 4).clone(), persistent=False)

    def forward(self, x: Tensor, image: Tensor | None) -> Tensor:
        """x (B, S*S, C), image (B, 3, S, S) or (B, 3, S/2, S/2) -> (B, 3, S, S)."""
        colours = (self.linear(x) + self.offset).transpose(1, 2).unflatten(2, (self.side, self.side))
        if image is None:
            return colours
        # Zeros between the pixels, then the filter: the same as a transposed convolution of each channel.
        return colours + (F.conv_transpose2d(image, self.fir, stride=2, padding=1, groups=3) if self.doubles else image)


class Stage(nn.Module):
    """Two blocks on maps of one side; but for the last stage, doubled; then read as colours."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        side, width = 2 ** (index + 2), config.widths[index]
        is_last = index == len(config.widths) - 1
        out = width if is_last else config.widths[index + 1]
        self.first, self.second = Block(config, width, side), Block(config, width, side)
        self.upsample = nn.Identity() if is_last else Upsample(width, out, side)
        self.to_rgb = ToRGB(out, side if is_last else 2 * side, doubles=not is_last)

    def forward(self, x: Tensor, ws: Tensor, image: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, S*S, C), ws (B, 2, L) and the picture so far -> x (B, 4*S*S, C') and the picture (B, 3, 2S, 2S)."""
        x = self.upsample(self.second(self.first(x, ws[:, 0]), ws[:, 1]))
        return x, self.to_rgb(x, image)


class Synthesis(nn.Module):
    """Draw a picture (B, 3, R, R), its values about -1 to 1, from one style for each block."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.start = nn.Parameter(torch.randn(1, 16, config.widths[0]))  # the map of side 4
        self.stages = nn.ModuleList(Stage(config, index) for index in range(len(config.widths)))
        self.initialize()

    def initialize(self) -> None:
        """The authors' start: small linears, faint colours, styles of unit variance, and positions at zero."""
        self.apply(start_small)
        for module in self.modules():
            if isinstance(module, DoubleAttention):
                nn.init.trunc_normal_(module.bias, std=0.02)
            elif isinstance(module, AdaptiveInstanceNorm):
                start_scaled(module.style)
            elif isinstance(module, ToRGB):
                nn.init.xavier_normal_(module.linear.weight, gain=0.02)

    def forward(self, ws: Tensor) -> Tensor:
        """ws (B, latents, L), a style for each block -> (B, 3, R, R)."""
        # A copy: an expanded view of a parameter asks for gradients even where none are wanted.
        x, image = self.start.repeat(ws.shape[0], 1, 1), None  # (B, 16, C)
        for index, stage in enumerate(self.stages):
            x, image = stage(x, ws[:, 2 * index : 2 * index + 2], image)
        assert image is not None
        return image


def start_scaled(layer: nn.Module) -> None:
    """Start a linear layer at weights of variance 1/inputs and no bias, as the release's scaled layers do."""
    assert isinstance(layer, nn.Linear)
    nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    nn.init.zeros_(layer.bias)


def build(config: Config) -> Networks:
    """The generator with the authors' start: z -> styles -> picture.

    Styles are values of the program, so that the engine of the synthesis draws mixed or edited styles too.
    """
    networks = {"mapping": Mapping(config), "synthesis": Synthesis(config)}
    ways = {"mapping": Network(takes=("z",), outputs=("ws",)), "synthesis": Network(takes=("ws",))}
    return Networks(networks, in_turn(ways, [InputSpec(name="ws", shape=(BATCH, config.latents, config.latent))]))


def inputs(config: Config) -> tuple[InputSpec, ...]:
    """The latent, drawn from a standard normal distribution."""
    return (InputSpec(name="z", role="noise", shape=(BATCH, config.latent)),)
