"""The diffusion process of DiT, 1,000 linear steps with learned variance, and guided sampling.

Sources: Ho et al. 2020, arXiv:2006.11239 (schedule); Nichol and Dhariwal 2021, arXiv:2102.09672 (learned variance,
equations 14 to 16); Song et al. 2020, arXiv:2010.02502 (DDIM, equation 12 with eta 0); Ho and Salimans 2022,
arXiv:2207.12598 (guidance); Salimans and Ho 2022, arXiv:2202.00512 (velocity, section 4 and appendix D).

Departure: the network here predicts the velocity, not the noise. Recovering the image from predicted noise divides by
nearly zero at the noisiest steps, which a network trained for an hour on two cores does not get over.

Shapes: B batch, C channels, S image side, T steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x (B, C, S, S), t (B,), y (B,) -> velocity and variance (B, 2C, S, S)."""


class Process:
    """A Gaussian diffusion of ``steps`` steps; image values lie in [-1, 1]."""

    def __init__(self, steps: int = 1000) -> None:
        self.steps = steps
        self.beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
        self.kept = torch.cumprod(1 - self.beta, 0)  # the share of the image's variance left after step t
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.kept[:-1]])
        self.posterior = self.beta * (1 - before) / (1 - self.kept)
        self.from_image = self.beta * before.sqrt() / (1 - self.kept)
        self.from_noisy = (1 - before) * (1 - self.beta).sqrt() / (1 - self.kept)

    def per_row(self, table: Tensor, t: Tensor) -> Tensor:
        """Table (T,) read at t (B,) -> (B, 1, 1, 1) in float32."""
        return table[t].float().view(-1, 1, 1, 1)

    def noisy(self, image: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The image after ``t`` steps: all (B, C, S, S)."""
        kept = self.per_row(self.kept, t)
        return kept.sqrt() * image + (1 - kept).sqrt() * noise

    def velocity(self, image: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network predicts: all (B, C, S, S)."""
        kept = self.per_row(self.kept, t)
        return kept.sqrt() * noise - (1 - kept).sqrt() * image

    def image(self, noisy: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """The image that a velocity implies, clipped to [-1, 1]: all (B, C, S, S)."""
        kept = self.per_row(self.kept, t)
        return (kept.sqrt() * noisy - (1 - kept).sqrt() * velocity).clamp(-1, 1)

    def timesteps(self, count: int) -> list[int]:
        """``count`` evenly spaced timesteps, the noisiest first."""
        return torch.linspace(self.steps - 1, 0, count).round().long().tolist()

    @torch.no_grad()
    def sample(self, denoise: Denoiser, noise: Tensor, y: Tensor, *, none: int, steps: int, guidance: float) -> Tensor:
        """Walk from ``noise`` (B, C, S, S) to images with DDIM; deterministic.

        Args:
            denoise: the network.
            noise: where to start; unit variance.
            y: classes (B,).
            none: the label that means "no class".
            steps: network evaluations.
            guidance: 1 follows the class alone; above 1 moves away from "no class" too.
        """
        x, channels = noise, noise.shape[1]
        times = self.timesteps(steps)
        for now, then in zip(times, [*times[1:], -1], strict=True):
            t = torch.full((2 * len(y),), now)
            both = denoise(torch.cat([x, x]), t, torch.cat([y, torch.full_like(y, none)]))
            asked, free = both[:, :channels].chunk(2)
            image = self.image(x, t[: len(y)], free + guidance * (asked - free))
            kept = self.kept[now].float()
            eps = (x - kept.sqrt() * image) / (1 - kept).sqrt()
            left = self.kept[then].float() if then >= 0 else torch.ones(())
            x = left.sqrt() * image + (1 - left).sqrt() * eps
        return x
