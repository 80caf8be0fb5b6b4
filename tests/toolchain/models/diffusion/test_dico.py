from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.models.diffusion import dico
from enginewright.passes.contract import macs_of_shapes
from enginewright.targets.onnx_export import export_onnx

TINY = dico.TINY
RELEASE = (
    *(0.0765, 0.61556, -0.24321, 0.08531),  # mean of each channel, picture after picture
    *(0.94128, 1.38117, 0.91025, 1.07014),  # deviation of each channel
    *(0.18242, -1.17671, 0.17085, -0.73341),  # at row 0, column 19
    *(-2.16774, 0.81291, -0.75435, 0.73985),  # at row 7, column 6
)


@cache
def meta(size: str) -> nn.Module:
    with torch.device("meta"):
        return dico.build(dico.PUBLISHED[size])


@cache
def macs(size: str, side: int) -> int:
    with torch.device("meta"):
        call = {"x": torch.zeros(1, 4, side, side), "t": torch.zeros(1), "y": torch.zeros(1, dtype=torch.long)}
    found = macs_of_shapes(meta(size), call)
    assert found is not None
    return found


def loud(network: nn.Module) -> nn.Module:
    """The network with weights so large that every mechanism speaks up."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.3)
    return network.eval().requires_grad_(False)


def call(batch: int = 2, height: int = 28, width: int = 28) -> dict[str, Tensor]:
    torch.manual_seed(2)
    x = torch.randn(batch, TINY.channels, height, width)
    return {"x": x, "t": torch.linspace(0, 999, batch), "y": torch.arange(batch) % (TINY.classes + 1)}


def release_shapes(config: dico.Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint of the authors, in their order."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, out: int, *rest: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, *rest)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def time(number: int, width: int) -> None:
        layer(f"t_embedder_{number}.mlp.0", width, 256)
        layer(f"t_embedder_{number}.mlp.2", width, width)

    def blocks(name: str, width: int, depth: int) -> None:
        for path in (f"{name}.{index}" for index in range(depth)):
            layer(f"{path}.conv1", width, width, 1, 1)
            layer(f"{path}.conv2", width, 1, 3, 3)
            layer(f"{path}.conv3", width, width, 1, 1)
            layer(f"{path}.ca.1", width, width, 1, 1)
            layer(f"{path}.conv4", config.mlp_ratio * width, width, 1, 1)
            layer(f"{path}.conv5", width, config.mlp_ratio * width, 1, 1)
            layer(f"{path}.adaLN_modulation.1", 6 * width, width)

    one, two, four = config.width, 2 * config.width, 4 * config.width
    layer("x_embedder.proj", one, config.channels, 3, 3)
    time(1, one)
    for index, width in enumerate((one, two, four)):
        layer(f"y_embedder.embedding_table_{index}", config.classes + 1, width, bias=False)
    time(2, two)
    time(3, four)
    blocks("encoder_level_1", one, config.depths[0])
    layer("down1_2.body.0", one // 2, one, 3, 3, bias=False)
    blocks("encoder_level_2", two, config.depths[1])
    layer("down2_3.body.0", one, two, 3, 3, bias=False)
    blocks("latent", four, config.depths[2])
    layer("up3_2.body.0", 2 * four, four, 3, 3, bias=False)
    layer("reduce_chan_level2", two, four, 1, 1)
    blocks("decoder_level_2", two, config.depths[3])
    layer("up2_1.body.0", four, two, 3, 3, bias=False)
    layer("reduce_chan_level1", two, two, 1, 1)
    blocks("decoder_level_1", two, config.depths[4])
    layer("final_layer.out_proj", 2 * config.channels, two, 3, 3)
    layer("final_layer.adaLN_modulation.1", 2 * two, two)
    return shapes


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights that follow from their number alone, on any machine."""
    state = {}
    for index, (name, shape) in enumerate(shapes.items()):
        count = torch.arange(int(np.prod(shape)), dtype=torch.float64)
        spread = 1.5 * float(np.prod(shape[1:])) ** -0.5 if len(shape) > 1 else 0.5
        state[name] = (spread * torch.sin(1.7 * count + 0.01 * count**2 + index)).view(shape)
    return state


@pytest.mark.parametrize(
    ("size", "count", "million", "giga"),
    [
        ("S", 33_137_672, 33.1, 4.25),
        ("B", 129_992_712, 130.0, 16.88),
        ("L", 463_897_992, 463.9, 60.24),
        ("XL", 701_151_368, 701.2, 87.30),
        ("H", 1_037_408_328, 1000, 194.15),
    ],
)
def test_parameters_and_macs_are_the_papers(size: str, count: int, million: float, giga: float) -> None:
    assert sum(weight.numel() for weight in meta(size).parameters()) == count
    assert count / 1e6 == pytest.approx(million, abs=0.05 if size != "H" else 50)
    # The paper counts a little more than the products: norms and the like.
    assert macs(size, 32) / 1e9 == pytest.approx(giga, rel=0.004)


def test_macs_grow_almost_as_the_number_of_cells() -> None:
    small, large = macs("XL", 32), macs("XL", 64)
    assert (small, large) == (87_220_969_472, 347_859_918_848)
    assert large / 1e9 == pytest.approx(349.78, rel=0.006)  # table 2


@torch.no_grad()
def test_the_same_weights_give_the_outputs_of_the_release() -> None:
    """Recorded in float64 from shallowdream204/DiCo at b596b05, its width and depths set to those of the tiny size."""
    network = dico.build(TINY).eval()
    weights = dico.from_release(numbered(release_shapes(TINY)))
    network.load_state_dict({name: weight.float() for name, weight in weights.items()})
    x = 2 * torch.sin(torch.arange(2 * 12 * 20, dtype=torch.float64) ** 1.5).view(2, 1, 12, 20)
    y = network(x.float(), torch.tensor([37.0, 811.0]), torch.tensor([3, 10]))
    found = [y.mean((2, 3)), y.std((2, 3)), y[:, :, 0, 19], y[:, :, 7, 6]]
    torch.testing.assert_close(torch.cat([part.flatten() for part in found]), torch.tensor(RELEASE), rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", dico.PUBLISHED)
def test_every_tensor_of_the_release_has_its_place(size: str) -> None:
    shapes = release_shapes(dico.PUBLISHED[size])
    state = dico.from_release({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in meta(size).state_dict().items()
    }


@torch.no_grad()
def test_at_the_start_every_block_is_the_identity_and_the_output_zero() -> None:
    torch.manual_seed(0)
    network = dico.build(TINY)
    x = torch.randn(2, 7, 7, 64)
    assert torch.equal(network.stages[2](x, torch.randn(2, 64)), x)
    assert not network(**call()).any()


def test_widths_are_one_two_four_two_and_two() -> None:
    network = meta("XL")
    assert [stage[0].mlp.fc1.in_features for stage in network.stages] == [416, 832, 1664, 832, 832]
    assert [len(stage) for stage in network.stages] == [9, 9, 10, 9, 9]


def changed_cells(module: nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
    """Which cells of the output (Y, X) move when the first cell of x (B, Y, X, D) does."""
    other = x.clone()
    other[:, 0, 0] += torch.randn(x.shape[3])
    return (module(x, *rest) - module(other, *rest)).abs().amax((0, 3)) > 1e-4


@torch.no_grad()
def test_without_its_gate_a_block_sees_a_cell_and_its_neighbours_with_it_the_whole_map() -> None:
    block = loud(dico.Block(16, 2))
    x, c = torch.randn(2, 6, 9, 16), torch.randn(2, 16)
    assert changed_cells(block, x, c).all()
    block.conv.gate.linear.weight.zero_()
    neighbours = torch.zeros(6, 9, dtype=torch.bool)
    neighbours[:2, :2] = True
    assert torch.equal(changed_cells(block, x, c), neighbours)


@torch.no_grad()
def test_a_gate_that_is_always_open_is_no_gate() -> None:
    module = loud(dico.ConvModule(16))
    x = torch.randn(2, 6, 9, 16)
    gated = module(x)
    module.gate.linear.weight.zero_()
    module.gate.linear.bias.fill_(50)
    plain = module.conv3(F.gelu(module.conv2(module.conv1(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1))
    torch.testing.assert_close(module(x), plain)
    assert (gated - plain).abs().max() > 0.1


@torch.no_grad()
def test_a_gate_mixes_the_means_of_all_channels_and_leaves_the_map_to_the_product() -> None:
    gate = loud(dico.ChannelGate(16))
    x = torch.randn(2, 16, 6, 9)
    shuffled = x.flatten(2)[:, :, torch.randperm(54)].view_as(x)
    torch.testing.assert_close(gate(shuffled), gate(x))
    x[:, 3] += 2
    assert ((gate(shuffled) - gate(x)).abs() > 1e-3).all()
    assert gate(x).shape == (2, 1, 1, 16)


def test_half_precision_averages_a_map_in_float32() -> None:
    exported = torch.export.export(dico.ChannelGate(4).half(), (torch.randn(1, 4, 64, 64).half(),))
    (mean,) = (node for node in exported.graph.nodes if "mean" in str(node.target))
    assert mean.args[0].meta["val"].dtype == torch.float32


@torch.no_grad()
def test_a_map_that_halves_and_doubles_keeps_its_places() -> None:
    """A cell's four children come from it alone, and its four channels in a row go to them row by row."""
    down, up = dico.Down(4), dico.Up(4, 1, 3)
    x = torch.randn(2, 6, 8, 4)
    nn.init.dirac_(down.conv.weight)
    halved = down(x)  # channels 0 to 3 hold channel 0 at (0, 0), (0, 1), (1, 0), (1, 1); the others channel 1
    assert torch.equal(halved[..., 0], x[:, ::2, ::2, 0])
    assert torch.equal(halved[..., 1], x[:, ::2, 1::2, 0])
    assert torch.equal(halved[..., 6], x[:, 1::2, ::2, 1])
    nn.init.dirac_(up.conv.weight)
    nn.init.eye_(up.join.weight)
    nn.init.zeros_(up.join.bias)
    kept = torch.randn(2, 6, 8, 1)
    doubled = up(halved[..., :4], kept)
    assert torch.equal(doubled[..., 0], x[..., 0])
    assert torch.equal(doubled[..., 2:], kept)


@torch.no_grad()
def test_timestep_and_class_reach_every_width() -> None:
    network, inputs = loud(dico.build(TINY)), call()
    before = network(**inputs)
    for index, condition in enumerate(network.conditions):
        for part in (condition.t_embedder.mlp[2], condition.y_embedder.embedding_table):
            kept = part.weight.clone()
            part.weight.zero_()
            assert (network(**inputs) - before).abs().max() > 0.05, (index, part)
            part.weight.copy_(kept)
    assert torch.equal(network(**inputs), before)


SIDES = {2: ("height", 8, 56, 4), 3: ("width", 8, 56, 4)}


@pytest.mark.parametrize(
    ("sides", "shapes"),
    [
        ({}, ((1, 28, 28), (3, 28, 28), (64, 28, 28))),
        pytest.param(SIDES, ((1, 8, 8), (2, 28, 28), (3, 12, 20), (64, 56, 56)), marks=pytest.mark.slow),
    ],
    ids=["one size", "any size"],
)
@torch.no_grad()
def test_the_onnx_graph_equals_the_network(sides: dict[int, Any], shapes: tuple[Any, ...], tmp_path: Path) -> None:
    network = loud(dico.build(dataclasses.replace(TINY, depths=(1, 0, 1, 0, 1))))  # each block costs a second
    batch = ("batch", 1, 64)
    dynamic = {"x": {0: batch, **sides}, "t": {0: batch}, "y": {0: batch}}
    export_onnx(network, call(), dynamic=dynamic, outputs=dico.OUTPUTS, path=tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for sizes in shapes:
        inputs = call(*sizes)
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        wanted = network(**inputs)
        assert wanted.std() > 0.5
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)


def test_weights_for_digits_are_sampled_and_judged_as_those_of_dit() -> None:
    network, calls = loud(dico.build(TINY)), []

    def runner(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append(len(inputs["x"]))
        return {"y": network(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()}

    task = dico.task("tiny", TINY)
    assert task is not None
    drawn = task.sample(runner, 2, 0)
    assert drawn.shape == (2, 1, 28, 28)
    assert calls == [4] * task.calls(2)
    assert task.read(drawn)[0].shape == (2,)
    met = dico.realistic(network, "tiny", TINY)
    assert met is not None
    assert [call["x"].shape for call in met(2, 0)] == [(2, 1, 28, 28)] * 2
    latents = dataclasses.replace(TINY, channels=4)
    assert dico.task("S", latents) is dico.realistic(network, "S", latents) is None
