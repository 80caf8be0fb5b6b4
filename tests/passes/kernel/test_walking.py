"""Blocks that stay get what they got before; a model that goes by a block's place keeps all of them or is set right."""

import copy

import pytest
import torch
import transformers
from torch import nn

from enginewright.passes.contract import Context
from enginewright.passes.dynamic.reuse_blocks import ReuseBlocks
from enginewright.passes.heads.perturb_heads import PerturbHeads
from enginewright.passes.pruning.prune_depth import PruneDepth
from enginewright.passes.pruning.prune_heads import PruneHeads
from enginewright.passes.traits import BlockStack, layer_at
from tests.passes.conftest import randomise

WINDOWS = ["sliding_attention", "full_attention"] * 2
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SIZES, "vocab_size": 60, "max_position_embeddings": 64, "num_key_value_heads": 2, "pad_token_id": 0}
WINDOWED = {
    "Gemma2": {"head_dim": 8, "sliding_window": 8, "layer_types": WINDOWS},
    "Gemma3": {"head_dim": 8, "sliding_window": 8, "layer_types": WINDOWS},
    "Qwen2": {"sliding_window": 8, "use_sliding_window": True, "layer_types": WINDOWS},
    "Qwen3": {"head_dim": 8, "sliding_window": 8, "use_sliding_window": True, "layer_types": WINDOWS},
    "Llama": {},
}


def call():
    ids = torch.randint(3, 60, (2, 30))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def causal(name):
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    settings = config(**TEXT, **WINDOWED[name], bos_token_id=1, eos_token_id=2, use_cache=False)
    return randomise(getattr(transformers, f"{name}ForCausalLM")(settings))


def rightly_cut(model, kept):
    """The model as one of fewer layers, made by hand."""
    model = copy.deepcopy(model)
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in kept])
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    model.config.num_hidden_layers = len(kept)
    return model


@pytest.mark.parametrize("name", WINDOWED)
def test_blocks_that_stay_keep_their_own_mask_and_rotary_table(name):
    model, inputs = causal(name), call()
    wanted = rightly_cut(model, [1, 2, 3])
    step = PruneDepth(method="list", blocks=("model.layers.0",))
    plan = step.plan(model, Context(example=inputs))
    before = list(getattr(model.config, "layer_types", None) or [])
    result = step.rewrite(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(result(**inputs).logits, wanted(**inputs).logits, atol=1e-6, rtol=1e-6)
    assert list(getattr(result.config, "layer_types", None) or []) == before, "the model's own configuration stays"


def moved(model, inputs, logits):
    with torch.no_grad():
        return float((model(**inputs).logits - logits).norm())


@pytest.mark.parametrize("method", ["influence", "greedy"])
def test_a_search_judges_the_right_cut(method):
    model, inputs = causal("Gemma3"), call()
    with torch.no_grad():
        logits = model(**inputs).logits
    context = Context(calibration=[inputs], score_of=lambda _: lambda m: -moved(m, inputs, logits))
    step = PruneDepth(count=1, method=method)
    plan = step.plan(model, context)
    (gone,) = plan.choice["model.layers"].removed
    wanted = rightly_cut(model, [i for i in range(4) if i != gone])
    with torch.no_grad():
        torch.testing.assert_close(step.rewrite(model, plan)(**inputs).logits, wanted(**inputs).logits)


GROUPED = pytest.mark.parametrize("name", ["Llama", "Gemma3", "Qwen3"])


@GROUPED
def test_query_heads_that_share_a_key_are_removed_as_if_they_were_masked(name):
    model, inputs = causal(name), call()
    result = PruneHeads(share=0.5).apply(copy.deepcopy(model), Context(calibration=[inputs]))
    assert len(result.changed) == 4
    for path in result.changed:
        [group] = result.plan.choice[path].removed
        model.get_submodule(path).o_proj.weight.data[:, 16 * group : 16 * group + 16] = 0
    with torch.no_grad():
        torch.testing.assert_close(result.model(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@GROUPED
def test_query_heads_that_share_a_value_are_pulled_towards_it(name):
    model, inputs = causal(name), call()
    pulled = PerturbHeads(u=1.0).apply(copy.deepcopy(model), Context(example=inputs)).model
    for layer in model.model.layers:
        attention = layer.self_attn

        def forward(hidden_states, attention=attention, **_):
            values = attention.v_proj(hidden_states).unflatten(-1, (2, 8))
            return attention.o_proj(values.repeat_interleave(2, dim=-2).flatten(-2)), None

        attention.forward = forward
    with torch.no_grad():
        torch.testing.assert_close(pulled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_a_list_that_is_read_by_position_and_not_known_keeps_the_stack():
    class ByPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = [torch.full((1, 8), float(i)) for i in range(3)]
            self.blocks = nn.ModuleList([AddingBlock() for _ in range(3)])

        def forward(self, x):
            for i, block in enumerate(self.blocks):
                x = block(x, self.tables[i])
            return x

    plan = PruneDepth(count=1, method="list", blocks=("blocks.0",)).plan(ByPlace(), Context(example={"x": X}))
    assert plan.choice == {}
    assert plan.skipped["blocks"] == (
        "the model goes by a block's place in the stack: without blocks [0], block 1 is given another '1'"
    )


X = torch.randn(2, 5, 8)


class AddingBlock(nn.Module):
    """A block of ours by its parts, which adds what it is given beside the stream."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, more=None):
        return x + self.mlp(self.attn(x)) + (0 if more is None else more)


def test_something_added_between_two_blocks_keeps_the_stack():
    class Controlled(nn.Module):  # a ControlNet's residuals, by place
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([AddingBlock() for _ in range(3)])

        def forward(self, x, residual):
            for block in self.blocks:
                x = block(x) + residual
            return x

    context = Context(calibration=[{"x": X, "residual": torch.ones(2, 5, 8)}])
    plan = PruneDepth(count=1).plan(Controlled(), context)
    assert plan.choice == {}
    assert plan.skipped["blocks"] == "block 1 reads something else than what block 0 gave: the model adds to it"


def hunyuan():
    from diffusers import HunyuanDiT2DModel

    model = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        hidden_size=16,
        sample_size=8,
        num_layers=6,
        mlp_ratio=2.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=24,
        pooled_projection_dim=24,
        text_len=5,
        text_len_t5=6,
        use_style_cond_and_image_meta_size=False,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "text_embedding_mask": torch.ones(2, 5),
        "encoder_hidden_states_t5": torch.randn(2, 6, 24),
        "text_embedding_mask_t5": torch.ones(2, 6),
        "image_rotary_emb": (torch.randn(16, 8), torch.randn(16, 8)),
    }
    return randomise(model), inputs


STEPS = (PruneDepth(), PruneDepth(method="greedy"), PruneDepth(method="list", blocks=("blocks.2",)))


@pytest.mark.parametrize("step", [*STEPS, ReuseBlocks(input="timestep")], ids=lambda step: step.name())
def test_a_long_skip_keeps_the_stack(step):
    model, inputs = hunyuan()
    context = Context(example=inputs, calibration=[inputs], score_of=lambda _: lambda m: 0.0)
    plan = step.plan(model, context)
    assert plan.choice == {}
    assert plan.skipped["blocks"] == "block 4 also reads what block 1 gave (a long skip)"


def test_a_neck_that_reads_as_many_states_as_there_are_blocks_keeps_the_stack():
    sizes = {**SIZES, "num_hidden_layers": 4, "patch_size": 14, "image_size": 28, "mlp_ratio": 2}
    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = transformers.Dinov2Config(**sizes, out_features=stages, reshape_hidden_states=False)
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    model = randomise(transformers.DepthAnythingForDepthEstimation(config))
    plan = PruneDepth().plan(model, Context(calibration=[{"pixel_values": torch.randn(1, 3, 28, 28)}]))
    assert plan.choice == {}
    (reason,) = (r for path, r in plan.skipped.items() if path.endswith("layer"))
    assert reason.startswith("the model does not run without blocks [0]: it ends in ValueError")


def test_a_shared_configuration_is_cut_for_the_stack_alone():
    model = causal("Gemma2")
    config = model.config
    layer_at(model, "model.layers", BlockStack).keep_blocks([0, 3])
    assert model.model.config.layer_types == ["sliding_attention", "full_attention"]
    assert model.model.config.num_hidden_layers == 2
    assert model.config is config
    assert (config.layer_types, config.num_hidden_layers) == (WINDOWS, 4)


@pytest.mark.slow
def test_a_windowed_model_is_exported_as_it_was_cut(tmp_path):
    import onnxruntime

    from enginewright import pipeline
    from enginewright.progress import Progress
    from enginewright.recipe import make

    model = causal("Gemma3")
    model.save_pretrained(tmp_path / "model", safe_serialization=True)
    step = {"pass": "prune_depth", "method": "list", "blocks": ["model.layers.0"]}
    recipe = make({"model": f"hf:{tmp_path / 'model'}", "steps": [step], "targets": [{"target": "onnxruntime"}]})
    pipeline.export(recipe, tmp_path / "out", force=False, progress=Progress(quiet=True))
    session, inputs = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx"), call()
    (got,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        wanted = rightly_cut(model, [1, 2, 3])(**inputs).logits
    assert torch.linalg.norm(torch.from_numpy(got) - wanted) / torch.linalg.norm(wanted) < 1e-5
