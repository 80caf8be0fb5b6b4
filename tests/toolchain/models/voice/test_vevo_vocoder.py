from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from enginewright import pipeline, sources
from enginewright.ground.runner import Runner
from enginewright.ground.signature import Array, Arrays
from enginewright.models.blocks.speech import excerpts
from enginewright.models.voice.vevo import vocoder
from enginewright.models.voice.vevo.mel import mel_frames
from enginewright.progress import Progress
from enginewright.recipe import make
from enginewright.reports import record
from enginewright.targets.onnx_export import export_onnx
from enginewright.targets.pytorch_engine import EagerRunner
from enginewright.validation.contract import SoundTask
from enginewright.validation.metrics.mel_distance import MelDistance
from enginewright.validation.metrics.sound_snr_db import SoundSnrDb

CONFIG = vocoder.Config(depth=2, width=64, hidden=128, n_fft=32, hop=8)


def spectrum_of(bins: int, frames: int, batch: int = 2) -> Tensor:
    """Any complex spectrum (B, K, T), with imaginary parts in its first and last bin too."""
    torch.manual_seed(0)
    return torch.randn(batch, bins, frames, dtype=torch.complex64)


def stacked(spectrum: Tensor) -> Tensor:
    """Complex (B, K, T) -> real parts, then imaginary parts (B, 2K, T)."""
    return torch.cat([spectrum.real, spectrum.imag], dim=1)


def test_the_published_size_has_the_counted_parameters() -> None:
    with torch.device("meta"):
        net = vocoder.Vocoder(vocoder.PUBLISHED["emilia"])
    assert sum(parameter.numel() for parameter in net.parameters()) == 255_042_434  # 255.0 M


@pytest.mark.parametrize(("n_fft", "hop"), [(1920, 480), (32, 8), (16, 8)])
def test_the_wave_is_that_of_torchs_inverse_transform(n_fft: int, hop: int) -> None:
    """Torch cuts half a frame from each end, the head only what a frame overlaps: half a hop more is left."""
    spectrum = spectrum_of(n_fft // 2 + 1, frames=12)
    wanted = torch.istft(spectrum, n_fft, hop, window=torch.hann_window(n_fft), center=True)
    found = vocoder.ISTFTHead(4, n_fft, hop).wave(stacked(spectrum))
    assert found.shape == (2, 12 * hop)
    assert wanted.shape == (2, 11 * hop)
    assert wanted.std() > 0.01
    torch.testing.assert_close(found[:, hop // 2 : -(hop // 2)], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frames", [1, 2, 3, 9])
def test_the_ends_are_divided_by_what_windows_lie_there(frames: int) -> None:
    """Frames added up one by one, with torch's inverse transform of each."""
    n_fft, hop, cut = 32, 8, 12
    spectrum = spectrum_of(17, frames)
    window = torch.hann_window(n_fft)
    total, energy = torch.zeros(2, n_fft + (frames - 1) * hop)
    single = torch.fft.irfft(spectrum[0], n_fft, dim=0)  # (F, T)
    for i in range(frames):
        total[i * hop : i * hop + n_fft] += single[:, i] * window
        energy[i * hop : i * hop + n_fft] += window.square()
    wanted = (total / energy)[cut:-cut]
    found = vocoder.ISTFTHead(4, n_fft, hop).wave(stacked(spectrum))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    if frames == 1:
        assert ((total[cut:-cut] / 1.5) - wanted).abs().max() > 0.05  # a constant would not do here


def test_magnitude_is_exponential_and_clipped_and_phase_may_be_any_number() -> None:
    head = vocoder.ISTFTHead(34, 32, 8)
    head.requires_grad_(False)
    head.out.weight.copy_(torch.eye(34))
    head.out.bias.zero_()
    torch.manual_seed(0)
    logarithm, phase = torch.randn(1, 17, 6), 20 * torch.randn(1, 17, 6)
    logarithm[0, 3, 2] = 50.0  # far beyond what is clipped

    def wave(logarithm: Tensor, phase: Tensor) -> Tensor:
        return head(torch.cat([logarithm, phase], dim=1).transpose(1, 2))

    wanted = head.wave(stacked(torch.polar(logarithm.exp().clamp(max=100), phase)))
    found = wave(logarithm, phase)
    assert found.abs().max() > 1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wave(logarithm, phase + 2 * torch.pi), found, rtol=1e-3, atol=1e-3)
    assert (wave(logarithm, phase + 1) - found).abs().max() > 1


def loud(config: vocoder.Config = CONFIG) -> vocoder.Vocoder:
    """A vocoder whose weights are large enough for every part of a block to matter."""
    torch.manual_seed(0)
    net = vocoder.Vocoder(config).eval().requires_grad_(False)
    for name, parameter in net.named_parameters():
        norm = name.endswith(("norm.weight", "gamma"))
        parameter.normal_(1.0 if norm else 0.0, 0.1)
    return net


def test_a_block_is_a_convolution_a_norm_an_mlp_and_a_scale_beside_a_residual() -> None:
    block = loud().backbone.convnext[0]
    weights = dict(block.named_parameters())
    x = torch.randn(2, 64, 11)
    y = F.conv1d(x, weights["dwconv.weight"], weights["dwconv.bias"], padding=3, groups=64).permute(0, 2, 1)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    y = y * weights["norm.weight"] + weights["norm.bias"]
    y = F.gelu(F.linear(y, weights["pwconv1.weight"], weights["pwconv1.bias"]))  # the exact one, not tanh's
    y = F.linear(y, weights["pwconv2.weight"], weights["pwconv2.bias"]) * weights["gamma"]
    assert y.std() > 0.3
    torch.testing.assert_close(block(x), x + y.permute(0, 2, 1), rtol=1e-5, atol=1e-5)


def test_the_backbone_normalises_before_and_after_its_blocks() -> None:
    backbone = loud().backbone
    mel = torch.randn(2, 128, 10)
    h = F.layer_norm(backbone.embed(mel).mT, (64,), backbone.norm.weight, backbone.norm.bias, 1e-6).mT
    for block in backbone.convnext:
        h = block(h)
    last = backbone.final_layer_norm
    wanted = F.layer_norm(h.mT, (64,), last.weight, last.bias, 1e-6)
    torch.testing.assert_close(backbone(mel), wanted, rtol=1e-5, atol=1e-5)
    assert vocoder.Vocoder(CONFIG).backbone.convnext[1].gamma.tolist() == [0.5] * 64  # one over the depth, at the start


def test_a_frame_is_a_hop_of_sound_and_is_heard_nearby_alone() -> None:
    net = loud()
    mel = torch.randn(1, 128, 60, generator=torch.Generator().manual_seed(1))
    other = mel.clone()
    other[:, :, 30] += 1
    change = (net(mel) - net(other)).abs()[0]
    assert net(mel).shape == (1, 60 * CONFIG.hop)
    reach = 3 * 3 + 2  # a convolution of seven in front and in both blocks, and the overlap
    heard = change.nonzero()
    assert (30 - reach) * CONFIG.hop <= heard.min() < 30 * CONFIG.hop
    assert 31 * CONFIG.hop < heard.max() < (31 + reach) * CONFIG.hop
    assert change.max() > 0.01


def test_the_kernel_of_the_transform_is_no_weight() -> None:
    net = vocoder.Vocoder(CONFIG)
    assert list(net.state_dict()) == [name for name, _ in net.named_parameters()]
    assert net.head.basis.shape == (34, 1, 32)
    assert net.head.basis[[17, 33]].abs().max() < 1e-7  # imaginary parts of the first and last bin


TASK = vocoder.task("tiny", vocoder.TINY)


@pytest.fixture(scope="module")
def tiny() -> vocoder.Vocoder:
    """The tiny vocoder, at weights with which speech is heard in its waves."""
    return loud(vocoder.TINY)


@pytest.fixture(scope="module")
def waves(tiny: vocoder.Vocoder) -> Array:
    """What it makes of speech in PyTorch."""
    return TASK.sample(EagerRunner(tiny, threads=1, outputs=vocoder.OUTPUTS), 2, 0)


@pytest.fixture(scope="module")
def engine(tiny: vocoder.Vocoder, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Its graph in ONNX Runtime."""
    path = tmp_path_factory.mktemp("vocoder") / "model.onnx"
    example = {"mel": torch.zeros(1, 128, vocoder.TYPICAL_FRAMES)}
    export_onnx(tiny, example, dynamic={}, outputs=["wave"], path=path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: {"wave": np.asarray(session.run(None, dict(inputs))[0])}


def test_the_job_is_two_seconds_of_speech_as_mel_frames_turned_into_waves(tiny: vocoder.Vocoder, waves: Array) -> None:
    seen = []

    def runner(inputs: Arrays) -> Arrays:
        seen.append(inputs["mel"])
        return {"wave": inputs["mel"][:, 0]}

    TASK.sample(runner, 2, 0)
    assert TASK.rate == 24_000
    assert TASK.calls is not None
    assert TASK.calls(2) == len(seen) == 2
    assert torch.equal(torch.from_numpy(np.concatenate(seen)), mel_frames(excerpts(2, 48_000, 0)))
    assert waves.shape == (2, 48_000)
    calls = vocoder.realistic(tiny, "tiny", vocoder.TINY)(2, 0)
    assert [call["mel"].shape for call in calls] == [(1, 128, 100)] * 2
    assert np.array_equal(calls[1]["mel"], seen[1])


def test_a_catalogue_model_with_random_weights_has_that_job() -> None:
    model = sources.load("vevo-vocoder:tiny")
    assert isinstance(model.task, SoundTask)
    assert model.weights == "random, seed 0"


def test_the_engines_waves_of_speech_sound_like_pytorchs(waves: Array, engine: Runner) -> None:
    found = TASK.sample(engine, 2, 0)
    assert MelDistance().measure(TASK, waves, found) < 1e-3
    assert SoundSnrDb().measure(TASK, waves, found) > 80


def test_noise_of_a_hundredth_in_the_mel_frames_would_be_heard(waves: Array, engine: Runner) -> None:
    """What the test above bounds is no distance that anything keeps."""
    noise = 0.01 * np.random.default_rng(0).normal(size=(1, 128, 100)).astype(np.float32)
    found = TASK.sample(lambda inputs: engine({"mel": inputs["mel"] + noise}), 2, 0)
    assert MelDistance().measure(TASK, waves, found) > 2e-3


@pytest.mark.slow
def test_a_recipe_may_gate_how_its_engine_sounds_and_the_report_shows_it(tmp_path: Path) -> None:
    content = {
        "model": "vevo-vocoder:tiny",
        "targets": [{"target": "onnxruntime"}],
        "gates": ["quality.mel_distance <= 1e-3", "quality.sound_snr_db >= 80"],
        "validation": {"rounds": 3, "calls": 2},
    }
    _, code = pipeline.export(make(content), tmp_path / "out", force=False, progress=Progress(quiet=True))
    assert code == 0
    report = record.read(tmp_path / "out" / "report.json")
    assert [gate.verdict for gate in report.gates] == ["met", "met"]
    assert {figure.name for figure in report.targets[0].quality} == {
        "mel_distance",
        "log_spectral_distance_db",
        "sound_snr_db",
    }
    assert "24000 samples a second" in (tmp_path / "out" / "report.html").read_text()
