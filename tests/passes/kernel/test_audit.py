"""Layers that have the parts of a known one and compute another thing are left alone, with a reason that says so."""

import functools

import pytest
import torch
import transformers
from torch import Tensor, nn

from enginewright.ground.errors import ToolchainError
from enginewright.passes.contract import Context
from enginewright.passes.dynamic.slice_width_by_timestep import SliceWidthByTimestep
from enginewright.passes.heads.perturb_heads import PerturbHeads
from enginewright.passes.heads.select_heads import SelectHeads
from enginewright.passes.kernel import audit
from enginewright.passes.kernel.audit import difference, disagreement, see
from enginewright.passes.moe.dense_to_moe import DenseToMoe
from enginewright.passes.pruning.approximate_by_accuracy import ApproximateByAccuracy
from enginewright.passes.pruning.prune_heads import PruneHeads
from enginewright.passes.pruning.prune_width import PruneWidth
from enginewright.passes.tokens.prune_tokens import PruneTokens
from enginewright.passes.tokens.skip_spatial_tokens import RunTokens, SkipSpatialTokens
from tests.passes.conftest import bert, randomise, vit
from tests.passes.joint import JOINT

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SIZES, "vocab_size": 70, "max_position_embeddings": 64}
PICTURE = {**SIZES, "image_size": 32, "patch_size": 8}


def ids(length=24):
    return {"input_ids": torch.randint(3, 60, (2, length)), "attention_mask": torch.ones(2, length, dtype=torch.long)}


def made(name, **config):
    """A random network of transformers, by the name of its family."""
    settings = getattr(transformers, f"{name}Config")(**config)
    return randomise(getattr(transformers, f"{name}Model")(settings))


UNLIKE_BERT = {
    "RoFormer": {"embedding_size": 32},
    "RobertaPreLayerNorm": {},
    "Xmod": {"languages": ["en"], "default_language": "en"},
    "BigBird": {"block_size": 4, "num_random_blocks": 1},
}


@pytest.mark.parametrize("name", UNLIKE_BERT)
def test_a_block_with_berts_parts_that_computes_another_thing_keeps_its_tokens(name):
    model = made(name, **TEXT, **UNLIKE_BERT[name])
    plan = PruneTokens(keep=0.5).plan(model, Context(calibration=[ids(48)]))
    assert plan.choice == {}
    assert plan.skipped["encoder.layer"].startswith(
        f"looks like a block that is known, and this {name}Layer does not compute like one: taken apart, it "
    )


@pytest.mark.parametrize("make", [bert, vit])
def test_a_block_that_is_what_it_looks_like_is_believed(make):
    subject = make("sdpa")
    assert PruneTokens(keep=0.5).plan(subject.model, Context(example=subject.inputs)).choice


def test_a_bias_from_outside_that_has_a_row_for_each_head_keeps_the_heads():
    config = transformers.BeitConfig(**PICTURE, use_relative_position_bias=True)
    model = randomise(transformers.BeitModel(config))
    plan = PruneHeads().plan(model, Context(example={"pixel_values": torch.randn(2, 3, 32, 32)}))
    assert plan.choice == {}
    assert "with one head taken out it ends in RuntimeError" in plan.skipped["layers.0.attention"]


def test_a_convolution_between_two_projections_keeps_the_hidden_units():
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    )
    model = randomise(transformers.SegformerModel(config))
    plan = PruneWidth().plan(model, Context(example={"pixel_values": torch.randn(1, 3, 32, 32)}))
    assert plan.choice == {}
    assert any("this SegformerMixMLP does not compute like one" in reason for reason in plan.skipped.values())


def test_what_stands_between_two_projections_is_found_though_it_keeps_every_shape():
    model = nn.Sequential(Mixing())
    plan = PruneWidth().plan(model, Context(example={"input": torch.randn(3, 8)}))
    assert plan.choice == {}
    assert plan.skipped["0"].endswith("with one hidden unit taken out it gives other values")


class Mixing(nn.Module):
    """What families take for a feed-forward of ours; its softmax makes every hidden unit hang on all others."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)).softmax(dim=-1))


class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = Mixing()

    def forward(self, x, t):
        return self.mix(x) * (1 + t[:, None])


@pytest.mark.parametrize(
    "step",
    [
        DenseToMoe(experts=4, top_k=1),
        SliceWidthByTimestep(steps=4, importance="activation", groups=4),
        ApproximateByAccuracy(score="s"),
    ],
    ids=lambda step: step.name(),
)
def test_no_pass_believes_a_feed_forward_that_is_none(step):
    call = {"x": torch.randn(3, 8), "t": torch.rand(3)}
    context = Context(example=call, calibration=[call], score_of=lambda text: lambda module: 0.0)
    plan = step.plan(Timed().eval(), context)
    assert plan.choice == {}
    assert any("does not compute like one" in reason for reason in plan.skipped.values())


def test_no_pass_believes_attention_with_a_bias_for_each_head():
    config = transformers.BeitConfig(**PICTURE, use_relative_position_bias=True)
    model, call = randomise(transformers.BeitModel(config)), {"pixel_values": torch.randn(2, 3, 32, 32)}
    context = Context(example=call, calibration=[call], score_of=lambda text: lambda module: 0.0)
    plan = PerturbHeads().plan(model, context)
    assert plan.choice == {}
    assert any("with one head taken out" in reason for reason in plan.skipped.values())
    with pytest.raises(ToolchainError, match="there are 0 to choose from"):
        SelectHeads(score="s", candidates=1).plan(model, context)


def test_layers_that_never_run_and_models_without_a_call_are_believed_by_their_structure():
    subject = vit("sdpa")
    assert see(subject.model, ["layers.0"], Context()) is None
    assert PruneHeads().plan(subject.model, Context()).choice


def test_a_model_without_values_is_looked_at_on_shapes():
    config = transformers.BeitConfig(**PICTURE, use_relative_position_bias=True)
    with torch.device("meta"):
        model = transformers.BeitModel(config).eval()
    seen = see(model, ["layers.0"], Context(example={"pixel_values": torch.randn(2, 3, 32, 32, device="meta")}))
    assert not seen.exact
    assert tuple(seen.calls["layers.0"][0].output.shape) == (2, 17, 32)


def test_answers_are_compared_by_form_and_by_value():
    x = torch.ones(2, 3)
    assert difference(x, x + 1e-7, exact=True) == ""
    assert difference(x, x + 1e-2, exact=True) == "it gives other values"
    assert difference((None, x), (x, x), exact=True) == "", "what nobody reads may be anything"
    assert difference((x,), x, exact=False) == "it gives a tensor (2, 3), and (a tensor (2, 3)) is wanted"
    assert difference(x, x * float("nan"), exact=True) == "it gives other values"


# Image tokens pass feed-forwards by, and text does not (SD3 and Flux)


@pytest.mark.parametrize("name", JOINT)
def test_text_tokens_run_through_every_feed_forward(name):
    subject = JOINT[name]()
    context = Context(example=subject.inputs, calibration=[subject.inputs])
    plan = SkipSpatialTokens(ratio=0.5).plan(subject.model, context)
    tokens = {"sd3": 16, "flux": 9}[name]
    assert len(plan.choice) == {"sd3": 3, "flux": 4}[name]
    assert {entry.of for entry in plan.choice.values()} == {tokens}, "text is not counted"

    everything = {path: RunTokens(tokens=tokens, of=tokens) for path in plan.choice}
    all_run = SkipSpatialTokens().rewrite(subject.copy(), type(plan)(choice=everything, arrays=plan.arrays))
    torch.testing.assert_close(subject.output(all_run), subject.output(subject.model), atol=1e-5, rtol=0)
    some_run = SkipSpatialTokens().rewrite(subject.copy(), plan)
    assert not torch.allclose(subject.output(some_run), subject.output(subject.model), atol=1e-3)


def test_the_tokens_that_pass_by_keep_their_value_and_text_never_does():
    subject = JOINT["flux"]()
    context = Context(example=subject.inputs, calibration=[subject.inputs])
    plan = SkipSpatialTokens(ratio=0.5).plan(subject.model, context)
    model = SkipSpatialTokens().rewrite(subject.copy(), plan)
    seen = []

    def note(module, given, output):
        seen.append(given[0].shape[1])

    for path in ("ff", "ff_context"):
        model.transformer_blocks[0].steps[0].block.get_submodule(path).register_forward_hook(note)
    model.single_transformer_blocks[0].steps[0].block.proj_mlp.register_forward_hook(note)
    subject.output(model)
    image, text = plan.choice["transformer_blocks.0"].tokens, 5
    assert sorted(seen) == sorted([image, text, image + text])


@functools.lru_cache(maxsize=8)
def grid(size: int) -> Tensor:
    return torch.ones(size)


class Cached(nn.Module):
    """Reads a table that a function remembers, as position grids are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + grid(x.shape[-1])


def test_a_look_on_shapes_alone_leaves_no_tensors_without_values_behind(monkeypatch):
    grid.cache_clear()
    monkeypatch.setattr(audit, "LARGEST", 0)  # as of a model that is too large to be run
    module, x = Cached().eval(), torch.randn(2, 4)
    seen = see(module, ["inner"], Context(example={"x": x}))
    assert seen is not None
    assert not seen.exact
    (whole,) = seen.calls[""]
    assert disagreement(seen, whole, Cached().eval()) == ""  # called again on what the first call was given
    assert grid.cache_info().currsize == 0
    with torch.no_grad():
        assert torch.equal(module(x), module.inner(x) + torch.ones(4))
