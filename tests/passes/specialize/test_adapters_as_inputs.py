from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from enginewright.added import with_inputs
from enginewright.ground.errors import ToolchainError
from enginewright.ground.signature import Dim
from enginewright.passes.contract import Context, Plan
from enginewright.passes.quantization.quantize_int8 import QuantizeInt8
from enginewright.passes.quantization.quantize_weights import QuantizeWeights
from enginewright.passes.specialize.adapter_files import network_config, read_adapters
from enginewright.passes.specialize.adapters_as_inputs import AdaptersAsInputs
from enginewright.passes.specialize.fold_adapters import FoldAdapters
from enginewright.sources.contract import Model
from enginewright.sources.denoisers import DENOISERS
from enginewright.targets.onnx_export import export_onnx
from enginewright.validation.inputs import draw
from tests.passes.conftest import Subject
from tests.passes.specialize.adapters import FORMS, factors, written
from tests.toolchain.sources.tiny_diffusers import NETWORKS, shaken

LAYERS = ("blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.1.mlp.fc1", "final_layer.linear")
"""Widths from 32 to 96, 96, 128 and 32."""
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def prepared(subject: Subject, folder: Path, **settings: Any) -> tuple[AdaptersAsInputs, nn.Module, Plan]:
    """A copy of a model whose adapters are inputs."""
    step = AdaptersAsInputs(**({"layers": LAYERS, "rank": 4} | settings))
    result = step.apply(subject.copy(), Context(folder=folder, example=subject.inputs))
    return step, result.model, result.plan


def arrays(step: AdaptersAsInputs, plan: Plan, folder: Path, name: str = "lora.safetensors", **more: Any) -> Any:
    file = read_adapters(name, folder, of=None, alpha=more.pop("alpha", 6.0))
    return step.arrays_of(file, plan, **more)


def answer(subject: Subject, model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**subject.inputs, **given)
    return found


def folded(subject: Subject, folder: Path, name: str = "lora.safetensors", **settings: Any) -> Tensor:
    step = FoldAdapters(file=name, alpha=6.0, **settings)
    return subject.output(step.apply(subject.copy(), Context(folder=folder)).model)


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_that_is_given_is_one_that_was_folded(form: str, dit: Subject, tmp_path: Path) -> None:
    written(tmp_path, factors(dit.model, LAYERS), form)
    step, model, plan = prepared(dit, tmp_path)
    found = answer(dit, model, arrays(step, plan, tmp_path, scale=0.5))
    torch.testing.assert_close(found, folded(dit, tmp_path, scale=0.5), **CLOSE)
    assert (found - dit.output(dit.model)).abs().max() > 1e-2


def test_adapters_are_switched_and_come_back_bit_for_bit(dit: Subject, tmp_path: Path) -> None:
    for name, rank in (("a.safetensors", 3), ("b.safetensors", 4)):
        written(tmp_path, factors(dit.model, LAYERS, rank), name=name)
    step, model, plan = prepared(dit, tmp_path)
    a, b = (arrays(step, plan, tmp_path, f"{name}.safetensors") for name in "ab")
    first, other, again = (answer(dit, model, each) for each in (a, b, a))
    assert torch.equal(first, again)
    layer: Any = model.get_submodule(LAYERS[0])
    assert layer.call.tensors == {}, "between calls nothing is kept"
    assert (first - other).abs().max() > 1e-2
    base = dit.output(dit.model)
    assert torch.equal(answer(dit, model, {}), base)
    zeros = {name: torch.zeros_like(each) for name, each in a.items()}
    assert torch.equal(answer(dit, model, zeros), base)


def test_matrices_of_equal_shape_share_an_input(dit: Subject, tmp_path: Path) -> None:
    step, model, plan = prepared(dit, tmp_path)
    new = {each.name: each for each in step.new_inputs(plan)}
    assert {name: each.shape for name, each in new.items()} == {
        "adapter_down_32": (4, 4, 32),
        "adapter_up_32": (1, 32, 4),
        "adapter_up_96": (2, 96, 4),
        "adapter_up_128": (1, 128, 4),
    }
    assert all((each.role, each.shared, each.default) == ("adapter", True, 0) for each in new.values())
    grown = with_inputs(Model(name="", module=model, inputs=(), outputs=("out",), weights=""), new.values())
    assert [spec.role for spec in grown.inputs] == ["adapter"] * 4
    drawn = draw(grown.inputs, seed=0)
    moved = answer(dit, model, {name: torch.from_numpy(each) for name, each in drawn.items()})
    change = (moved - dit.output(dit.model)).norm() / moved.norm()
    assert 0.02 < change < 0.5, "drawn adapters are seen, and drown nothing"


def test_a_smaller_adapter_is_filled_up_with_zeros(dit: Subject, tmp_path: Path) -> None:
    written(tmp_path, factors(dit.model, LAYERS, rank=2))
    tight = answer(dit, *narrow(dit, tmp_path, 2))
    torch.testing.assert_close(answer(dit, *narrow(dit, tmp_path, 16)), tight, **CLOSE)
    step, _, plan = prepared(dit, tmp_path, rank=16)
    given = arrays(step, plan, tmp_path)
    assert not given["adapter_down_32"][:, 2:].any()
    assert given["adapter_down_32"][:, :2].any(dim=(1, 2)).all()


def narrow(subject: Subject, folder: Path, rank: int) -> tuple[nn.Module, Any]:
    step, model, plan = prepared(subject, folder, rank=rank)
    return model, arrays(step, plan, folder)


def test_files_say_which_layers_and_which_rank(dit: Subject, tmp_path: Path) -> None:
    written(tmp_path, factors(dit.model, LAYERS[:2], rank=3), name="a.safetensors")
    written(tmp_path, factors(dit.model, LAYERS[2:], rank=5), name="b.safetensors")
    files = ("a.safetensors", "b.safetensors")
    step, model, plan = prepared(dit, tmp_path, layers=(), rank=None, files=files, alpha=6.0)
    assert tuple(plan.choice) == LAYERS
    assert {each.rank for each in plan.choice.values()} == {5}
    assert plan.skipped["blocks.0.attn.proj"] == "no file adapts it"
    for name in files:
        found = answer(dit, model, arrays(step, plan, tmp_path, name))
        torch.testing.assert_close(found, folded(dit, tmp_path, name), **CLOSE)


def test_what_is_intended_multiplies_the_matrices_first(dit: Subject, tmp_path: Path) -> None:
    written(tmp_path, factors(dit.model, LAYERS))
    step, model, plan = prepared(dit, tmp_path)
    given = arrays(step, plan, tmp_path)
    intended = step.intended(dit.model, plan, Context())
    torch.testing.assert_close(answer(dit, intended, given), answer(dit, model, given), **CLOSE)
    assert not any(type(module).__name__ == "GivenMatrices" for module in dit.model.modules())
    with torch.no_grad():
        model.get_submodule("blocks.1.mlp.fc1").down = intended.get_submodule("blocks.0.attn.qkv").down
    assert (answer(dit, intended, given) - answer(dit, model, given)).abs().max() > 1e-3, "a mistake shows"


def test_the_words_count_what_the_side_paths_cost(dit: Subject, tmp_path: Path) -> None:
    step = AdaptersAsInputs(layers=LAYERS, rank=4)
    result = step.apply(dit.copy(), Context(example=dit.inputs))
    rows = 2 * 16  # pictures of 8 x 8 in patches of 2
    added = rows * 4 * sum(32 + wide for wide in (96, 96, 128, 32))
    assert result.before.macs is not None
    assert result.after.macs == result.before.macs + added
    assert result.plan.facts.fusable is False
    (note,) = result.plan.facts.notes
    assert note.startswith(f"the adapters of 4 layers are inputs, which is not fusable: they add {added:,} multiply-")


@pytest.mark.parametrize("first", ["quantize", "adapt"])
@pytest.mark.parametrize("quantizer", [QuantizeWeights(smallest=0), QuantizeInt8(smallest=0)])
def test_a_quantized_base_takes_adapters(first: str, quantizer: Any, dit: Subject, tmp_path: Path) -> None:
    written(tmp_path, factors(dit.model, LAYERS))
    context = Context(calibration=[dit.inputs], example=dit.inputs, folder=tmp_path)
    adapt = AdaptersAsInputs(layers=LAYERS, rank=4)
    base = quantizer.apply(dit.copy(), context).model
    if first == "quantize":
        result = adapt.apply(quantizer.apply(dit.copy(), context).model, context)
        model, plan = result.model, result.plan
    else:
        result = adapt.apply(dit.copy(), context)
        model, plan = quantizer.apply(result.model, context).model, result.plan
    given = arrays(adapt, plan, tmp_path)
    assert not isinstance(model.get_submodule("blocks.0.attn.qkv.base"), nn.Linear)
    if first == "quantize":
        assert torch.equal(answer(dit, model, {}), dit.output(base))
    wanted = folded(dit, tmp_path)
    error = (answer(dit, model, given) - wanted).norm() / wanted.norm()
    without = (answer(dit, model, {}) - wanted).norm() / wanted.norm()
    assert error < 0.25 < without


# Networks of diffusers


def pairs_of(model: nn.Module, paths: tuple[str, ...]) -> Any:
    return {path.removeprefix("inner."): pair for path, pair in factors(model, paths).items()}


NETS = {
    "FluxTransformer2DModel": ("flux", ("*transformer_blocks.*.attn.to_?", "*.proj_out")),
    "UNet2DConditionModel": ("unet", ("*.to_?", "*.proj_in", "*.ff.net.2")),
}


def network(kind: str) -> tuple[Any, Any, dict[str, int]]:
    """A small network, its inputs, and sizes of their dimensions."""
    net = DENOISERS[kind].flat(shaken(NETWORKS[NETS[kind][0]]()))
    specs = DENOISERS[kind].inputs(net.inner.config)
    dims = {d.name: max(d.low, 2 * d.multiple_of) for spec in specs for d in spec.shape if isinstance(d, Dim)}
    return net, specs, dims


@pytest.mark.parametrize("kind", NETS)
def test_networks_of_diffusers_take_adapters(kind: str, tmp_path: Path) -> None:
    net, specs, dims = network(kind)
    call = {key: torch.from_numpy(array) for key, array in draw(specs, seed=0, sizes=dims).items()}
    step, before = AdaptersAsInputs(layers=NETS[kind][1], rank=4), copy.deepcopy(net)
    result = step.apply(net, Context(example=call))
    assert len(result.changed) > 4
    assert (kind == "UNet2DConditionModel") == any(
        isinstance(before.get_submodule(path), nn.Conv2d) for path in result.changed
    )
    written(tmp_path, pairs_of(before, result.changed), "diffusers")
    file = read_adapters("lora.safetensors", tmp_path, of=network_config(net), alpha=None)
    given = step.arrays_of(file, result.plan)
    with torch.no_grad():
        base, found, intended = before(**call), net(**call, **given), step.intended(before, result.plan, Context())
        merged = FoldAdapters(file="lora.safetensors").apply(copy.deepcopy(before), Context(folder=tmp_path)).model
        assert torch.equal(net(**call), base)
        torch.testing.assert_close(found, intended(**call, **given), atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(found, merged(**call), atol=2e-5, rtol=2e-5)
    assert (found - base).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETS)
def test_graphs_of_networks_of_diffusers_take_adapters(kind: str, tmp_path: Path) -> None:
    net, specs, dims = network(kind)
    call = {key: torch.from_numpy(array) for key, array in draw(specs, seed=0, sizes=dims).items()}
    step = AdaptersAsInputs(layers=NETS[kind][1], rank=4)
    result = step.apply(net, Context(example=call))
    model = Model(name="", module=result.model, inputs=specs, outputs=("out",), weights="")
    grown = with_inputs(model, step.new_inputs(result.plan)).inputs
    example = {key: torch.from_numpy(array) for key, array in draw(grown, seed=2, sizes=dims).items()}
    dynamic = {
        s.name: {0: (d.name, d.low, d.high)} for s in grown if isinstance(d := s.shape[0], Dim) and d.name == "batch"
    }
    export_onnx(net, example, dynamic=dynamic, outputs=["out"], path=tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for rows in (1, 3):
        again = draw(grown, seed=4, sizes={**dims, "batch": rows})
        with torch.no_grad():
            wanted = net(**{key: torch.from_numpy(array) for key, array in again.items()}).numpy()
        (found,) = session.run(None, again)
        np.testing.assert_allclose(found, wanted, atol=1e-4)


# A strength alone


@pytest.fixture
def two(dit: Subject, tmp_path: Path) -> Path:
    """A folder with two adapters, of which only the second is for the last layer."""
    written(tmp_path, factors(dit.model, LAYERS[:3], rank=3), name="a.safetensors")
    written(tmp_path, factors(dit.model, LAYERS[1:], rank=2), name="b.safetensors")
    return tmp_path


def by_strength(dit: Subject, folder: Path) -> tuple[AdaptersAsInputs, nn.Module, Plan]:
    files = ("a.safetensors", "b.safetensors")
    return prepared(dit, folder, inputs="strength", files=files, layers=(), rank=None, alpha=6.0)


def test_a_strength_scales_each_file_on_its_own(dit: Subject, two: Path) -> None:
    step, model, plan = by_strength(dit, two)
    (new,) = step.new_inputs(plan)
    assert (new.name, new.shape, new.role, new.default) == ("adapter_strength", (2,), "strength", 1)
    assert [plan.choice[path].ranks for path in LAYERS] == [(3, 0), (3, 2), (3, 2), (0, 2)]

    def at(*strengths: float) -> Tensor:
        return answer(dit, model, {"adapter_strength": torch.tensor(strengths)})

    assert torch.equal(at(0, 0), dit.output(dit.model))
    assert torch.equal(at(1, 1), answer(dit, model, {}))
    torch.testing.assert_close(at(1, 0), folded(dit, two, "a.safetensors"), **CLOSE)
    torch.testing.assert_close(at(0, 0.5), folded(dit, two, "b.safetensors", scale=0.5), **CLOSE)
    both = FoldAdapters(file="b.safetensors", alpha=6.0)
    first = FoldAdapters(file="a.safetensors", alpha=6.0).apply(dit.copy(), Context(folder=two)).model
    torch.testing.assert_close(at(1, 1), dit.output(both.apply(first, Context(folder=two)).model), **CLOSE)
    given = {"adapter_strength": torch.tensor([0.3, 1.7])}
    intended = step.intended(dit.model, plan, Context())
    torch.testing.assert_close(answer(dit, intended, given), answer(dit, model, given), **CLOSE)
    assert (at(0.3, 1.7) - at(1, 1)).abs().max() > 1e-2


def test_matrices_that_stay_inside_are_counted(dit: Subject, two: Path) -> None:
    result = AdaptersAsInputs(inputs="strength", files=("a.safetensors",), alpha=6.0).apply(
        dit.copy(), Context(folder=two, example=dit.inputs)
    )
    added = sum(3 * (32 + wide) for wide in (96, 96, 128))
    assert result.after.parameter_count == result.before.parameter_count + added
    assert "have their strength as an input, which is not fusable" in result.plan.facts.notes[0]


# What a user can mend


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "needs layers and rank, or files that say both"),
        ({"layers": ("*",)}, "needs layers and rank, or files that say both"),
        ({"inputs": "strength", "layers": ("*",), "rank": 4}, "takes files, and neither layers nor rank"),
        ({"layers": ("nothing.*",), "rank": 4}, "layers 'nothing.*' matches no layer"),
        ({"files": ("none.safetensors",)}, "there is no adapter file 'none.safetensors'"),
    ],
)
def test_what_is_missing_is_said(settings: Any, said: str, dit: Subject, tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match=re.escape(said)):
        AdaptersAsInputs(**settings).apply(dit.copy(), Context(folder=tmp_path))


def test_an_adapter_of_a_larger_rank_is_refused(dit: Subject, tmp_path: Path) -> None:
    written(tmp_path, factors(dit.model, LAYERS, rank=5))
    step, _, plan = prepared(dit, tmp_path)
    with pytest.raises(ToolchainError, match="has rank 5, and there is room for 4") as caught:
        arrays(step, plan, tmp_path)
    assert caught.value.help == "export again with rank = 5"


def test_an_adapter_for_other_layers_is_refused(dit: Subject, tmp_path: Path) -> None:
    written(tmp_path, factors(dit.model, (*LAYERS, "blocks.0.attn.proj"), rank=4))
    step, _, plan = prepared(dit, tmp_path)
    with pytest.raises(ToolchainError, match="1 entries of 'lora.safetensors' match no layer"):  # noqa: RUF043
        arrays(step, plan, tmp_path)
    assert arrays(step.model_copy(update={"partly": True}), plan, tmp_path)


def test_what_is_no_product_beside_a_layer_is_left_to_folding(dit: Subject, tmp_path: Path) -> None:
    step, _, plan = prepared(dit, tmp_path)
    pairs = factors(dit.model, LAYERS[:1])
    written(tmp_path, pairs, more={f"base_model.model.{LAYERS[0]}.lora_magnitude_vector": torch.ones(96)})
    with pytest.raises(ToolchainError, match="holds a dora, which is no product of two matrices") as caught:
        arrays(step, plan, tmp_path)
    assert caught.value.help == "fold_adapters merges it into the weights"
    written(tmp_path, factors(dit.model, ("x_embedder.proj",)))
    with pytest.raises(ToolchainError, match="adapts a Conv2d of more than one cell"):
        prepared(dit, tmp_path, layers=(), rank=None, files=("lora.safetensors",), alpha=6.0)
    written(tmp_path, {LAYERS[0]: (torch.ones(3, 31), torch.ones(96, 3))})
    with pytest.raises(ToolchainError, match=r"down \(3, 31\), up \(96, 3\) do not fit a layer from 32 to 96"):
        arrays(step, plan, tmp_path)


def test_a_layer_that_no_call_runs_is_left_alone() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    result = AdaptersAsInputs(layers=("*",), rank=2).apply(Aside(), Context(example={"x": torch.ones(1, 4)}))
    assert result.changed == ("used",)
    assert result.plan.skipped == {"idle": "no call runs it as a layer"}


def test_a_layer_that_was_cut_before_is_refused_in_words(dit: Subject) -> None:
    from enginewright.passes.pruning.prune_width import PruneWidth

    cut = PruneWidth(share=0.5).apply(dit.copy(), Context(calibration=[dit.inputs])).model
    step = AdaptersAsInputs(layers=("blocks.*.mlp.fc1",), rank=2)
    plan = step.plan(cut, Context(example=dit.inputs))
    with pytest.raises(ToolchainError, match="a step before has cut or replaced this layer") as caught:
        step.intended(dit.model, plan, Context())
    assert caught.value.where == "blocks.0.mlp.fc1"


def test_peft_computes_the_same_unfused(dit: Subject, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["qkv", "fc1"])
    oracle = peft.get_peft_model(dit.copy(), config).eval()
    with torch.no_grad():
        for name, tensor in oracle.named_parameters():
            if ".lora_" in name:
                tensor.normal_(std=0.2)
    oracle.save_pretrained(tmp_path)
    file = "adapter_model.safetensors"
    step, model, plan = prepared(dit, tmp_path, layers=("*.qkv", "*.fc1"), rank=3)
    found = answer(dit, model, arrays(step, plan, tmp_path, file, alpha=None))
    torch.testing.assert_close(found, dit.output(oracle), **CLOSE)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(ToolchainError, match=r"no key of 'empty\.safetensors' adapts a layer"):
        arrays(step, plan, tmp_path, "empty.safetensors")
