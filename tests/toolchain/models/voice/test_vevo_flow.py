from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from enginewright.ground.signature import Arrays
from enginewright.models.blocks.speech import excerpts
from enginewright.models.voice.vevo import flow, sampling
from enginewright.models.voice.vevo.mel import mel_frames
from enginewright.targets.pytorch_engine import EagerRunner
from enginewright.validation.metrics.mel_distance import MelDistance

CONFIG = flow.TINY


@pytest.fixture(scope="module")
def net() -> flow.Flow:
    """A flow whose weights are large enough for the time, the codes and every frame to matter."""
    torch.manual_seed(0)
    made = flow.Flow(CONFIG).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(1.0 if name.endswith("to_weight.bias") else 0.0, 0.12)
    return made.requires_grad_(False)


def call(batch: int = 2, frames: int = 20, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy frames, times, codes, and a mask of ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, frames, CONFIG.mels, generator=generator)
    t = torch.rand(batch, generator=generator)
    codes = torch.randint(0, CONFIG.codes, (batch, frames), generator=generator)
    return x, t, codes, torch.ones(batch, frames)


def test_the_published_size_has_the_counted_parameters() -> None:
    with torch.device("meta"):
        made = flow.Flow(flow.PUBLISHED["emilia"])
    assert sum(parameter.numel() for parameter in made.parameters()) == 337_694_848  # 337.7 M


def test_padded_frames_change_nothing_and_frames_that_are_there_do(net: flow.Flow) -> None:
    x, t, codes, mask = call()
    wanted = net(x, t, codes, mask)
    tail = 100 * torch.randn(2, 7, CONFIG.mels)
    longer = torch.cat([x, tail], dim=1), t, torch.cat([codes, codes[:, :7]], dim=1)
    masked = torch.cat([mask, torch.zeros(2, 7)], dim=1)
    assert wanted.std() > 0.2
    torch.testing.assert_close(net(*longer, masked)[:, :20], wanted, rtol=1e-4, atol=1e-5)
    assert (net(*longer, torch.ones_like(masked))[:, :20] - wanted).abs().max() > 0.1


def test_every_frame_sees_every_other_and_where_it_stands(net: flow.Flow) -> None:
    x, t, codes, mask = call(batch=1)
    wanted = net(x, t, codes, mask)
    late = x.clone()
    late[:, -1] += 3
    assert (net(late, t, codes, mask)[:, 0] - wanted[:, 0]).abs().max() > 0.01  # no causal mask
    turned = net(x.flip(1), t, codes.flip(1), mask).flip(1)
    assert (turned - wanted).abs().max() > 0.05  # a set of frames without an order would give the same


def test_time_codes_and_their_absence_matter(net: flow.Flow) -> None:
    x, t, codes, mask = call()
    wanted = net(x, t, codes, mask)
    none = torch.full_like(codes, CONFIG.codes)
    others = (
        net(x, t, (codes + 1) % CONFIG.codes, mask),
        net(x, t, none, mask),
        net(x, (t + 0.4) % 1, codes, mask),
    )
    for other in others:
        assert (other - wanted).abs().max() > 0.1
    zeroed = net.cond_mlp(torch.zeros(2, 20, CONFIG.width))
    torch.testing.assert_close(net.condition(none), zeroed)
    assert zeroed.abs().max() > 0.05  # no condition is not nothing: the MLP has biases


def test_a_table_of_norm_weights_for_a_schedule_gives_the_live_velocities(net: flow.Flow) -> None:
    x, _, codes, mask = call()
    times = torch.tensor(sampling.midpoints(8))
    table = net.norm_weights(times)
    assert table.shape == (8, 2 * CONFIG.depth + 1, CONFIG.width)
    for row, time in zip(table, times, strict=True):
        live = net(x, time.expand(2), codes, mask)
        torch.testing.assert_close(net.from_norms(x, row.expand(2, -1, -1), codes, mask), live, rtol=1e-5, atol=1e-5)
    assert (net.from_norms(x, table[:1].expand(2, -1, -1), codes, mask) - live).abs().max() > 0.1


def test_norms_stand_in_order_and_scale_to_unit_root_mean_square(net: flow.Flow) -> None:
    time = net.diff_step_mlp(net.diff_step_embedding(torch.tensor([0.3])))
    table = net.norm_weights(torch.tensor([0.3]))
    assert torch.equal(table[:, 3], net.layers[1].post_attention_layernorm.to_weight(time))  # type: ignore[operator, union-attr]
    assert torch.equal(table[:, -1], net.norm.to_weight(time))
    x = 5 + torch.randn(1, 4, CONFIG.width)
    rms = x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(net.norm(x, table[:, -1]), table[:, -1][:, None] * x / rms, rtol=1e-4, atol=1e-5)


def test_norms_start_as_plain_ones() -> None:
    table = flow.Flow(CONFIG).norm_weights(torch.tensor([0.1, 0.9]))
    assert torch.equal(table, torch.ones_like(table))


def test_time_is_coded_by_sines_then_cosines_of_falling_rates() -> None:
    found = flow.TimeEmbedding(64)(torch.tensor([0.0, 1.0]))
    assert found[0].tolist() == [0.0] * 32 + [1.0] * 32
    assert found[1, 0].item() == pytest.approx(0.84147, abs=1e-5)  # sin(1): no factor of 1000
    assert found[1, 31].item() == pytest.approx(1e-4, rel=1e-3)  # the last rate is 1/10000 exactly


def test_at_one_time_the_layers_are_a_llama_with_those_norms_and_every_key_in_sight(net: flow.Flow) -> None:
    from transformers import LlamaConfig, LlamaModel

    x, _, codes, mask = call(batch=1)
    mask[0, 15:] = 0
    time = net.diff_step_mlp(net.diff_step_embedding(torch.tensor([0.3])))
    state = {name: w for name, w in net.state_dict().items() if name.startswith("layers.") and "layernorm" not in name}
    for name, part in net.named_modules():
        if isinstance(part, flow.AdaptiveRMSNorm):
            state[f"{name}.weight"] = part.to_weight(time)[0]
    theirs = LlamaModel(
        LlamaConfig(
            vocab_size=1,
            hidden_size=CONFIG.width,
            intermediate_size=CONFIG.hidden,
            num_hidden_layers=CONFIG.depth,
            num_attention_heads=CONFIG.heads,
            attn_implementation="eager",
        )
    )
    theirs.load_state_dict(state | {"embed_tokens.weight": torch.zeros(1, CONFIG.width)}, strict=True)
    hidden = torch.where(mask > 0, 0.0, torch.finfo(torch.float32).min).expand(1, 1, 20, 20)
    with torch.no_grad():
        embedded = net.mel_mlp(x) + net.cond_mlp(net.cond_emb(codes))
        last = theirs(inputs_embeds=embedded, attention_mask=hidden, use_cache=False).last_hidden_state
    wanted = net.mel_out_mlp(last)
    assert (last - embedded).std() > 0.5
    torch.testing.assert_close(net(x, torch.tensor([0.3]), codes, mask), wanted, rtol=1e-4, atol=1e-5)


def test_tables_of_positions_and_rates_are_no_weights(net: flow.Flow) -> None:
    assert list(net.state_dict()) == [name for name, _ in net.named_parameters()]


def test_the_job_goes_on_from_a_second_of_speech_and_gives_logarithmic_mel_frames(net: flow.Flow) -> None:
    task = flow.task("tiny", CONFIG)
    seen: list[Arrays] = []
    current = np.random.default_rng(0).normal(size=(100, 128)).astype(np.float32)

    def steady(inputs: Arrays) -> Arrays:
        """One velocity for each frame at all times; the last frames are those that are drawn."""
        seen.append(inputs)
        return {"velocity": current[None, -inputs["x"].shape[1] :]}

    drawn = task.sample(steady, 2, 0)
    assert drawn.shape == (2, 128, 50)
    assert task.calls is not None
    assert task.calls(2) == len(seen) == 128  # with and without a condition, 32 times, for each of two
    given, alone = seen[0], seen[1]
    assert torch.equal(torch.from_numpy(given["x"][:, :50]).mT, mel_frames(excerpts(2, 24_000, 0))[:1])
    assert given["x"].shape == (1, 100, 128)
    assert (alone["codes"] == CONFIG.codes).all()
    # A second of a steady velocity, in the scale of logarithms by the authors' mean and deviation.
    np.testing.assert_allclose(drawn[0].T, (alone["x"][0] + current[50:]) * 8.14**0.5 - 4.92, rtol=1e-4, atol=1e-4)
    assert not np.array_equal(drawn[0], drawn[1])


def test_a_time_that_engines_get_wrong_is_seen_in_what_is_drawn(net: flow.Flow) -> None:
    task = flow.task("tiny", CONFIG)
    runner = EagerRunner(net, threads=1, outputs=flow.OUTPUTS)
    wanted = task.sample(runner, 1, 0)
    assert MelDistance().measure(task, wanted, task.sample(runner, 1, 0)) < 1e-6
    late = task.sample(lambda inputs: runner({**inputs, "t": inputs["t"] + np.float32(0.1)}), 1, 0)
    assert MelDistance().measure(task, wanted, late) > 1e-2


def test_a_layer_may_be_left_out_with_its_norms(net: flow.Flow) -> None:
    class Away(nn.Module):
        def forward(self, x: Tensor, *_: object) -> Tensor:
            return x

    call_of_both = call()
    without, shorter = copy.deepcopy(net), copy.deepcopy(net)
    without.layers[1] = Away()
    del shorter.layers[1]
    found = without(*call_of_both)
    assert torch.equal(found, shorter(*call_of_both))
    assert (found - net(*call_of_both)).abs().max() > 0.1
