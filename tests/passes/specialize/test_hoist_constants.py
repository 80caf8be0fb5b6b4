import shutil

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context, macs
from enginewright.passes.networks import program_of
from enginewright.passes.specialize.hoist_constants import HoistConstants
from enginewright.targets.contract import Graph, ShapeRange
from enginewright.targets.onnx_export import export_onnx
from enginewright.targets.split_graph import split_graph
from enginewright.targets.tensorrt_rtx_engine import TensorRtRtx
from tests.passes.conftest import Subject, randomise, reference_dit
from tests.passes.joint import flux, sd3
from tests.toolchain.sources import tiny_diffusers

TEXT = ("encoder_hidden_states", "pooled_projections")
IDS = ("img_ids", "txt_ids")


def pixart() -> Subject:
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "timestep": torch.tensor([3.0, 700.0]),
    }
    return Subject(model=randomise(tiny_diffusers.pixart()), inputs=inputs, paths=())


def unet() -> Subject:
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
    }
    return Subject(model=randomise(tiny_diffusers.unet()), inputs=inputs, paths=())


CASES = {
    "dit": (reference_dit, ("y",)),
    "dit_timestep": (reference_dit, ("t",)),
    "pixart": (pixart, ("encoder_hidden_states", "encoder_attention_mask")),
    "unet": (unet, ("encoder_hidden_states",)),
    "sd3": (sd3, TEXT),
    "flux": (flux, (*TEXT, *IDS)),
}
FIRST_NORM = "transformer_blocks.0.norm1_context.norm"
"""What the first block does to text before it meets the timestep."""

MODULES = {
    "dit": {"y_embedder"},
    "dit_timestep": {"t_embedder"},
    "sd3": {"context_embedder", "time_text_embed.text_embedder", FIRST_NORM},
    "flux": {"context_embedder", "time_text_embed.text_embedder", "pos_embed", FIRST_NORM},
}


def applied(subject, constant):
    step = HoistConstants(constant=constant)
    return step.apply(subject.model, Context(calibration=[subject.inputs], example=subject.inputs))


def parted(subject, constant, folder, *, open_batch=True):
    """Both graphs, and how they are called."""
    inputs = {name: tensor.float() if name == "t" else tensor for name, tensor in subject.inputs.items()}
    dynamic = {name: {0: ("batch", 1, 8)} for name in inputs if open_batch and name not in IDS}
    export_onnx(subject.model, inputs, dynamic=dynamic, outputs=["y_"], path=folder / "model.onnx")
    shutil.copyfile(folder / "model.onnx", folder / "whole.onnx")
    graphs = folder / "prepare.onnx", folder / "step.onnx"
    return graphs, split_graph(folder / "model.onnx", constant, *graphs)


def arrays_of(inputs):
    return {name: tensor.float().numpy() if name == "t" else tensor.numpy() for name, tensor in inputs.items()}


AS_WRITTEN = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
"""Operations are not fused: what ONNX Runtime fuses in the whole graph can lie on both sides of the cut."""

AS_USED = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL


def run(path, arrays, level=AS_USED):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    assert {value.name for value in session.get_inputs()} == set(arrays)
    return {name: torch.from_numpy(out) for name, out in zip(names, session.run(None, arrays), strict=True)}


def pair(graphs, halves, inputs, level=AS_USED):
    arrays = arrays_of(inputs)
    passed = run(graphs[0], {name: arrays[name] for name in halves.prepare}, level)
    assert tuple(passed) == halves.passed
    return run(graphs[1], {**{name: arrays[name] for name in halves.step}, **arrays_of(passed)}, level)["y_"]


@pytest.mark.parametrize(
    "name",
    ["dit", "dit_timestep", "pixart", *(pytest.param(n, marks=pytest.mark.slow) for n in ("unet", "sd3", "flux"))],
)
def test_prepare_then_step_is_what_the_model_gives(name, tmp_path):
    make, constant = CASES[name]
    subject = make()
    open_batch = name != "pixart"  # its mask's rows are tied to the batch by the source's wrapper
    graphs, halves = parted(subject, constant, tmp_path, open_batch=open_batch)
    assert not set(halves.step) & set(constant)
    whole = tmp_path / "whole.onnx"
    for rows in (2, 3) if open_batch else (2,):
        inputs = {
            key: value if key in IDS else value.repeat(2, *[1] * (value.ndim - 1))[:rows]
            for key, value in subject.inputs.items()
        }
        with torch.no_grad():
            wanted = subject.model(**inputs)
        wanted = wanted if isinstance(wanted, torch.Tensor) else wanted[0]
        found = pair(graphs, halves, inputs, AS_WRITTEN)
        assert torch.equal(found, run(whole, arrays_of(inputs), AS_WRITTEN)["y_"]), "the same operations, cut in two"
        torch.testing.assert_close(pair(graphs, halves, inputs), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_plan_names_what_hangs_on_constants_alone(name):
    make, constant = CASES[name]
    subject = make()
    before = subject.output(subject.model)
    result = applied(subject, constant)
    assert torch.equal(subject.output(result.model), before)
    changed = set(result.changed)
    if name in MODULES:
        assert changed == MODULES[name]
    else:
        cross = {
            path
            for path, layer in subject.model.named_modules()
            if path.endswith(("attn2.to_k", "attn2.to_v", "caption_projection"))
        }
        assert changed == cross
    facts = result.plan.facts
    assert result.before.macs - result.after.macs == facts.macs_once
    assert facts.macs_per_step == result.after.macs == macs(result.model, subject.inputs)
    assert facts.bytes_once == sum(
        4 * p.numel() for path in changed for p in subject.model.get_submodule(path).parameters()
    )
    assert program_of(result.model).hoisted[""].constant == constant


def test_no_weight_is_written_twice_or_read_by_both(tmp_path):
    subject = pixart()
    graphs, _ = parted(subject, CASES["pixart"][1], tmp_path, open_batch=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        "prepare.onnx",
        "step.onnx",
        "whole.onnx",
        "model.safetensors",
    }
    read = [offsets(path) for path in graphs]
    assert read[0]
    assert not read[0] & read[1]
    assert read[0] | read[1] == offsets(tmp_path / "whole.onnx")


def offsets(path):
    """Where in the weight file the weights of a graph begin."""
    tensors = [value.const_value for value in ir.load(path).graph.initializers.values()]
    return {tensor.offset for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def test_where_nothing_hangs_on_the_constants_alone_the_model_stays():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, y):
            return self.inner(x + y)

    subject = Subject(model=Mixed(), inputs={"x": torch.ones(2, 4), "y": torch.ones(2, 4)}, paths=())
    result = applied(subject, ("y",))
    assert result.changed == ()
    assert result.plan.skipped == {"": "no module of it depends on y alone"}
    assert not program_of(result.model).hoisted
    assert result.after == result.before


def test_weights_that_a_step_shares_are_not_counted_as_prepared():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.each = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.each.weight = self.once.weight

        def forward(self, x, y):
            return self.each(x) + self.once(y)

    subject = Subject(model=Tied(), inputs={"x": torch.ones(2, 4), "y": torch.ones(2, 4)}, paths=())
    facts = applied(subject, ("y",)).plan.facts
    assert (facts.bytes_once, facts.macs_once, facts.macs_per_step) == (0, 32, 32)


def test_both_graphs_build(dit, tmp_path):
    dit.inputs["t"] = dit.inputs["t"].float()
    graphs, halves = parted(dit, ("y",), tmp_path, open_batch=False)
    passed = run(graphs[0], {"y": dit.inputs["y"].numpy()})
    for path, inputs in zip(graphs, ({"y": dit.inputs["y"]}, {**dit.inputs, **passed}), strict=True):
        folder = tmp_path / path.stem
        folder.mkdir()
        ranges = {
            name: ShapeRange(*(tuple(tensor.shape),) * 3) for name, tensor in inputs.items() if name in known(path)
        }
        TensorRtRtx().build(Graph(path=path, ranges=ranges), folder)
        assert list(folder.iterdir())
    assert known(graphs[1]) == {"x", "t", *halves.passed}


def test_what_stays_the_same_over_a_run_is_known_by_its_role(dit):
    result = applied(dit, ())
    assert result.plan.facts.constant == ("y",)
    assert applied(dit, ("y",)).plan.digest() == result.plan.digest()
    with pytest.raises(ToolchainError, match="no input of the model is known to stay the same over a run"):
        HoistConstants().plan(nn.Linear(2, 2), Context(calibration=[{"input": torch.zeros(1, 2)}]))


def known(path):
    return {value.name for value in ir.load(path).graph.inputs}


@pytest.mark.parametrize(
    ("constant", "message"),
    [
        (("z",), "no input named 'z'"),
        (("x", "t", "y"), "every input is constant; a step needs one that changes"),
    ],
)
def test_what_cannot_be_hoisted_is_quoted(dit, constant, message):
    with pytest.raises(ToolchainError, match=message):
        HoistConstants(constant=constant).plan(dit.model, Context(calibration=[dit.inputs]))


def test_without_a_call_there_is_nothing_to_follow(dit):
    with pytest.raises(ToolchainError, match="got none"):
        HoistConstants(constant=("y",)).plan(dit.model, Context())
