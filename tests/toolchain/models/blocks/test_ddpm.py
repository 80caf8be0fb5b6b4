from __future__ import annotations

import torch

from enginewright.models.blocks.ddpm import Process


def test_image_and_noise_come_back_from_the_velocity() -> None:
    torch.manual_seed(0)
    process, image, noise = Process(), torch.rand(4, 1, 2, 2) * 2 - 1, torch.randn(4, 1, 2, 2)
    t = torch.tensor([0, 300, 700, 999])
    noisy = process.noisy(image, t, noise)
    torch.testing.assert_close(process.image(noisy, t, process.velocity(image, t, noise)), image, rtol=1e-4, atol=1e-5)


def test_the_schedule_is_linear_and_ends_in_noise() -> None:
    process = Process()
    assert process.beta[0] == 1e-4
    assert process.beta[-1] == 0.02
    assert process.kept[-1] < 1e-4
    assert process.timesteps(5) == [999, 749, 500, 250, 0]


def test_a_perfect_denoiser_is_walked_to_its_image() -> None:
    process = Process()
    image = torch.linspace(-1, 1, 4).view(1, 1, 2, 2)

    def perfect(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        kept = process.per_row(process.kept, t)
        noise = (x - kept.sqrt() * image) / (1 - kept).sqrt()
        velocity = process.velocity(image.expand_as(x), t, noise)
        return torch.cat([velocity, torch.zeros_like(velocity)], dim=1)

    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    found = process.sample(perfect, noise, torch.zeros(3).long(), none=1, steps=6, guidance=2.0)
    torch.testing.assert_close(found, image.expand(3, 1, 2, 2), rtol=1e-3, atol=1e-3)


def test_guidance_moves_away_from_no_class() -> None:
    process = Process()

    def by_class(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        velocity = torch.where(y == 1, 0.0, -0.1).view(-1, 1, 1, 1).expand_as(x)
        return torch.cat([velocity, velocity], dim=1)

    noise = torch.zeros(1, 1, 2, 2)
    one, two = (
        process.sample(by_class, noise, torch.tensor([0]), none=1, steps=4, guidance=g).mean() for g in (1.0, 3.0)
    )
    assert two > one > 0
