from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from enginewright.models.voice.vevo import flow, sampling

NONE = 32


def test_times_are_the_middles_of_equal_steps() -> None:
    assert sampling.midpoints(4) == [0.125, 0.375, 0.625, 0.875]
    assert len(sampling.midpoints(sampling.STEPS)) == 32


def test_guidance_moves_away_and_brings_three_quarters_of_the_spread_back() -> None:
    torch.manual_seed(0)
    velocity, free = torch.randn(1, 30, 8), torch.randn(1, 30, 8)
    guided = 2 * velocity - free
    wanted = 0.75 * guided * velocity.std() / guided.std() + 0.25 * guided
    found = sampling.guide(velocity, free)
    torch.testing.assert_close(found, wanted)
    assert (found - guided).abs().max() > 0.5
    torch.testing.assert_close(sampling.guide(velocity, free, rescale=0.0), guided)
    torch.testing.assert_close(sampling.guide(velocity, free, scale=0.0), velocity)
    assert sampling.guide(velocity, free, scale=3.0, rescale=1.0).std().item() == pytest.approx(velocity.std().item())


def test_a_sample_is_guided_by_its_own_spread() -> None:
    torch.manual_seed(0)
    velocity, free = torch.randn(2, 30, 8) * torch.tensor([1.0, 20.0])[:, None, None], torch.randn(2, 30, 8)
    torch.testing.assert_close(sampling.guide(velocity, free)[:1], sampling.guide(velocity[:1], free[:1]))


def test_a_perfect_velocity_carries_noise_to_the_mel() -> None:
    torch.manual_seed(0)
    mel, noise, prompt = torch.randn(1, 6, 4), torch.randn(1, 6, 4), torch.randn(1, 3, 4)
    _, velocity = sampling.training_pair(mel, noise, torch.tensor([0.5]))

    def perfect(x: Tensor, t: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
        at, _ = sampling.training_pair(mel, noise, t - 0.5 / 5)
        torch.testing.assert_close(x[:, 3:], at)  # each step starts where the path is
        return torch.cat([torch.full_like(prompt, 99.0), velocity], dim=1)

    codes = torch.zeros(1, 9).long()
    found = sampling.draw_mel(perfect, prompt, codes, noise, none=NONE, steps=5, scale=0.0)
    torch.testing.assert_close(found, mel + sampling.SIGMA * noise)


def test_a_training_pair_is_a_point_on_the_path_and_its_slope() -> None:
    mel, noise = torch.tensor([[[2.0]]]), torch.tensor([[[-1.0]]])
    start, slope = sampling.training_pair(mel, noise, torch.tensor([0.0]))
    end, _ = sampling.training_pair(mel, noise, torch.tensor([1.0]))
    assert start == noise
    assert end.item() == pytest.approx(2 - 1e-5)
    torch.testing.assert_close(end - start, slope)
    warped = sampling.warp_time(torch.tensor([0.0, 0.5, 1.0]))
    assert warped.tolist() == pytest.approx([0.0, 1 - math.sqrt(0.5), 1.0], abs=1e-6)


def test_the_unconditional_call_sees_the_frames_to_draw_alone() -> None:
    prompt, noise, codes = torch.full((1, 3, 4), 7.0), torch.zeros(1, 5, 4), torch.arange(8)[None]
    seen = []

    def watch(x: Tensor, t: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
        seen.append((x, t, codes, mask))
        return torch.arange(x.numel()).view(x.shape) % 5.0

    sampling.draw_mel(watch, prompt, codes, noise, none=NONE, steps=1)
    (x, t, given, mask), (alone, _, none, alone_mask) = seen
    assert x[0, :, 0].tolist() == [7.0] * 3 + [0.0] * 5
    assert t.tolist() == [0.5]
    assert given.tolist() == [list(range(8))]
    assert alone.tolist() == noise.tolist()
    assert none.tolist() == [[NONE] * 5]
    assert mask.sum() == 8
    assert alone_mask.sum() == 5


def test_a_network_of_one_length_draws_the_same_mel() -> None:
    torch.manual_seed(0)
    net = flow.Flow(flow.TINY).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.normal_(0, 0.1)
    lengths = []

    def fixed(x: Tensor, t: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
        lengths.append(x.shape[1])
        return net(x, t, codes, mask)

    prompt, noise, codes = torch.randn(1, 6, 128), torch.randn(1, 10, 128), torch.randint(0, NONE, (1, 16))
    wanted = sampling.draw_mel(net, prompt, codes, noise, none=NONE, steps=3)
    found = sampling.draw_mel(fixed, prompt, codes, noise, none=NONE, steps=3, length=24)
    assert lengths == [24] * 6
    assert (wanted - noise).std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_mel_is_normalised_by_the_released_figures() -> None:
    found = sampling.normalize_mel(torch.tensor([-4.92, -4.92 + math.sqrt(8.14)]))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0]))


def test_tokens_are_drawn_as_transformers_would() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = 4 * torch.randn(3, 200)
    ids = torch.zeros(3, 1).long()
    wanted = logits.index_fill(1, torch.tensor([5]), -math.inf)
    for warp in (TemperatureLogitsWarper(0.8), TopKLogitsWarper(50), TopPLogitsWarper(0.9)):
        wanted = warp(ids, wanted)
    found = sampling.token_probabilities(logits, forbidden=5)
    torch.testing.assert_close(found, wanted.softmax(1))
    assert (found > 0).sum(1).max() < 50  # the share cuts before the count does
    assert ((sampling.token_probabilities(logits / 50) > 0).sum(1) < 50).all()
    assert ((sampling.token_probabilities(logits, top_k=3, top_p=1.0) > 0).sum(1) == 3).all()


def test_the_likeliest_token_is_always_left() -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    assert sampling.token_probabilities(logits, top_p=0.1).tolist() == [[0.0, 1.0, 0.0]]
    assert sampling.token_probabilities(logits, forbidden=1, top_p=0.1).tolist() == [[0.0, 0.0, 1.0]]
