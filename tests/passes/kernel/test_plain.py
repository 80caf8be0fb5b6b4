"""GPT-2's layers are linear layers, and PyTorch's encoder calls the layers that were put in it."""

import copy

import pytest
import torch
import transformers
from torch import nn

from enginewright.passes.contract import Context, Plan
from enginewright.passes.kernel.plain import plain, without_fast_path
from enginewright.passes.pruning.factorize import Factorize
from enginewright.passes.pruning.prune_depth import PruneDepth
from enginewright.passes.pruning.prune_heads import PruneHeads
from enginewright.passes.pruning.prune_width import PruneWidth
from enginewright.passes.pruning.sparsify_2_4 import Sparsify24
from enginewright.passes.quantization.quantize_fp8 import QuantizeFp8
from enginewright.passes.quantization.quantize_int8 import QuantizeInt8
from enginewright.passes.quantization.quantize_svd import QuantizeSvd
from enginewright.passes.quantization.quantize_weights import QuantizeWeights
from tests.passes.conftest import randomise


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False, bos_token_id=1, eos_token_id=2
    )
    ids = torch.randint(3, 60, (2, 12))
    return randomise(transformers.GPT2LMHeadModel(config)), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def context(inputs):
    return Context(example=inputs, calibration=[inputs])


def test_a_layer_that_keeps_its_weight_the_other_way_round_is_a_linear_layer_around_the_same_bytes():
    model, inputs = gpt2()
    before, weight = logits(model, inputs), model.transformer.h[0].mlp.c_fc.weight
    model = plain(copy.deepcopy(model, {id(t): t for t in model.parameters()}))
    layer = model.transformer.h[0].mlp.c_fc
    assert type(layer) is nn.Linear
    assert layer.weight.data_ptr() == weight.data_ptr()
    torch.testing.assert_close(logits(model, inputs), before)


def test_gpt2_in_8_bits_is_gpt2_in_8_bits_everywhere():
    model, inputs = gpt2()
    wanted = logits(model, inputs)
    result = QuantizeInt8(smallest=0).apply(copy.deepcopy(model), context(inputs))
    assert len([path for path in result.changed if ".h." in path]) == 2 * 4
    got = logits(result.model, inputs)
    assert 0 < torch.linalg.norm(got - wanted) / torch.linalg.norm(wanted) < 0.2


@pytest.mark.parametrize("step", [PruneHeads(), PruneWidth(), Factorize(smallest=0), Sparsify24(), PruneDepth(count=1)])
def test_other_passes_change_gpt2s_layers_too(step):
    model, inputs = gpt2()
    wanted = logits(model, inputs)
    result = step.apply(copy.deepcopy(model), context(inputs))
    assert result.changed
    assert not torch.allclose(logits(result.model, inputs), wanted)


def test_a_removed_head_of_gpt2_is_a_masked_one():
    model, inputs = gpt2()
    plan = PruneHeads().plan(plain(copy.deepcopy(model)), context(inputs))
    masked = plain(copy.deepcopy(model))
    for path, entry in plan.choice.items():
        for head in entry.removed:
            masked.get_submodule(path).c_proj.weight.data[:, head * 8 : head * 8 + 8] = 0
    result = PruneHeads().carry_out(copy.deepcopy(model), plan, Context())
    torch.testing.assert_close(logits(result, inputs), logits(masked, inputs), atol=1e-5, rtol=1e-5)


# No report leaves a matrix out


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.own


@pytest.mark.parametrize("step", [QuantizeInt8(smallest=0), QuantizeWeights(smallest=0), Factorize(), Sparsify24()])
def test_a_matrix_that_no_pass_knows_is_named_among_those_left_alone(step):
    model = nn.Sequential(nn.Linear(8, 8), Odd(), nn.LSTM(8, 8))
    plan = step.plan(model, Context(calibration=[{"input": torch.randn(2, 3, 8)}]))
    assert plan.skipped["1"].startswith("Odd (holds own): only linear layers")
    assert plan.skipped["2"].startswith("LSTM (holds weight_ih_l0, weight_hh_l0): only linear layers")


# PyTorch's own encoder


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
        self.encoder, self.out = nn.TransformerEncoder(layer, 2), nn.Linear(16, 5)

    def forward(self, x):
        return self.out(self.encoder(x))


X = torch.randn(2, 7, 16)
STEPS = [
    QuantizeInt8(smallest=0),
    QuantizeFp8(smallest=0),
    QuantizeWeights(smallest=0, block=16),
    QuantizeSvd(smallest=0, rank=2),
    Factorize(smallest=0),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name())
def test_a_changed_encoder_of_pytorch_can_be_called(step):
    model = Encoder().eval()
    with torch.no_grad():
        wanted = model(X)
    result = step.apply(copy.deepcopy(model), Context(example={"x": X}, calibration=[{"x": X}]))
    assert {"encoder.layers.0.linear1", "encoder.layers.0.linear2"} & set(result.changed)
    assert "encoder.layers.0.self_attn.out_proj" not in result.changed
    assert (
        "without calling it" in result.plan.skipped["encoder.layers.0.self_attn.out_proj"] or step.name() == "factorize"
    )
    assert "in_proj_weight" in result.plan.skipped["encoder.layers.0.self_attn"]
    with torch.no_grad():
        got = result.model(X)
    assert not torch.allclose(got, wanted, atol=1e-7), "the layers that were put in it run"
    assert torch.linalg.norm(got - wanted) / torch.linalg.norm(wanted) < 0.8


def test_a_plan_that_is_read_again_gives_an_encoder_that_can_be_called():
    model, step = Encoder().eval(), QuantizeInt8(smallest=0)
    result = step.apply(copy.deepcopy(model), Context(calibration=[{"x": X}]))
    plan = Plan.from_json(result.plan.as_json(), result.plan.arrays, by=step.declared)
    with torch.no_grad():
        assert torch.equal(step.carry_out(copy.deepcopy(model), plan, Context())(X), result.model(X))


def test_without_the_fast_path_the_encoder_computes_the_same():
    model = Encoder().eval()
    with torch.no_grad():
        torch.testing.assert_close(without_fast_path(copy.deepcopy(model))(X), model(X), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_gpt2_in_8_bits_is_exported(tmp_path):
    import onnxruntime

    from enginewright import load_module, pipeline
    from enginewright.progress import Progress
    from enginewright.recipe import make

    model, inputs = gpt2()
    model.save_pretrained(tmp_path / "model", safe_serialization=True)
    for steps in ([{"pass": "quantize_int8", "smallest": 0}], [{"pass": "prune_width"}], []):
        recipe = make({"model": f"hf:{tmp_path / 'model'}", "steps": steps, "targets": [{"target": "onnxruntime"}]})
        out = tmp_path / f"out-{len(steps)}-{steps[0]['pass'] if steps else 'plain'}"
        pipeline.export(recipe, out, force=False, progress=Progress(quiet=True))
        session = onnxruntime.InferenceSession(out / "model.onnx")
        (got,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        with torch.no_grad():
            wanted = load_module(out)(**inputs).logits
        assert torch.linalg.norm(torch.from_numpy(got) - wanted) / torch.linalg.norm(wanted) < 2e-3
