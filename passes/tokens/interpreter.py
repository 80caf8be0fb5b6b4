"""IA-RED2's interpreter, and a start for it that needs no training.

Source: Pan et al. 2021, arXiv:2106.12620 (IA-RED2), section 3.2: the score of a token is the mean over heads of the
sigmoid of the product of a learned policy token, projected, and of the token, projected; tokens above 0.5 stay.
Departures: the policy token's projection is the same for every picture, so each head's product is one affine function
of the token, and that function is what is learned here (6 columns for DeiT-S, not two projections of 384). The start
is ours: least squares of those functions towards the logarithm of the attention that the tokens get in the blocks
after the border, over its mean, so that 0.5 stands for the mean.

Shapes: B batch, N tokens, D width, H heads, S samples (tokens of all calls).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RIDGE = 1e-3
"""Of the mean square of the features, added for each: the calibration tokens may be fewer than the width."""


class Interpreter(nn.Module):
    """Scores in (0, 1) of tokens: (B, N, D) -> (B, N)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.products = nn.Linear(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        """Mean over heads."""
        return self.products(x).sigmoid().mean(dim=-1)


def interpreter(weight: Tensor, bias: Tensor, like: Tensor) -> Interpreter:
    """Around weight (H, D) and bias (H,), with the type and device of a tensor; draws no random numbers."""
    with torch.device("meta"):
        made = Interpreter(weight.shape[1], weight.shape[0])
    for name, value in (("weight", weight), ("bias", bias)):
        made.products.register_parameter(name, nn.Parameter(value.detach().clone().to(like)))
    return made


class Fit:
    """Least squares of an interpreter's products, from tokens that come by call after call.

    It keeps sums of products in double precision, (D, D) and (D, H), and none of the tokens.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.x, self.target = torch.zeros(()), torch.zeros(())
        self.square, self.cross = torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor, attention: Tensor) -> None:
        """Tokens (S, D) and the attention (S, H) that they got, over its mean."""
        features, target = x.double(), attention.double().clamp(min=1e-6).log()
        self.tokens += len(features)
        self.x, self.target = self.x + features.sum(dim=0), self.target + target.sum(dim=0)
        self.square, self.cross = self.square + features.T @ features, self.cross + features.T @ target

    def solved(self) -> tuple[Tensor, Tensor]:
        """Weight (H, D) and bias (H,); not finite where a token was not."""
        mean, aim = self.x / self.tokens, self.target / self.tokens
        square = self.square - self.tokens * mean[:, None] * mean
        ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype, device=square.device)
        weight = torch.linalg.solve(square + ridge, self.cross - self.tokens * mean[:, None] * aim).T  # (H, D)
        return weight.float(), (aim - weight @ mean).float()
