import pytest
import torch

from enginewright.passes.contract import Context
from enginewright.passes.pruning.prune_heads import PruneHeads, taylor_scores
from enginewright.passes.traits import FeedForward, FixedAttention, HeadedAttention, layer_at, layers_of
from tests.passes.joint import JOINT, flux, sd3


@pytest.fixture(params=JOINT)
def joint(request, calm):
    return JOINT[request.param]()


def silenced(subject, removed):
    """A copy in which these heads say nothing, to the image or to the text."""
    model = subject.copy()
    for path, heads in removed.items():
        layer = layer_at(model, path, HeadedAttention)
        width = layer.heads * layer.head_dim
        for output in layer.outputs:
            with torch.no_grad():
                output.weight[:, :width].unflatten(1, (layer.heads, layer.head_dim))[:, heads] = 0
    return model


def test_every_layer_is_found_once(joint):
    found = dict(layers_of(joint.model, HeadedAttention))

    assert tuple(found) == joint.paths
    assert {(layer.heads, layer.head_dim) for layer in found.values()} == {(4, 8)}
    assert list(layers_of(joint.model, FixedAttention)) == []


@pytest.mark.parametrize("importance", ["weight_norm", "taylor"])
def test_a_removed_head_is_a_silent_head(joint, importance):
    before = joint.output(joint.model)
    step = PruneHeads(share=0.5, importance=importance)

    result = step.apply(joint.copy(), Context(calibration=[joint.inputs]))

    removed = {path: entry.removed for path, entry in result.plan.choice.items()}
    after = joint.output(result.model)
    assert result.changed == joint.paths
    torch.testing.assert_close(after, joint.output(silenced(joint, removed)), atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 1e-2
    again = PruneHeads(share=0.5).apply(result.model, Context())
    assert [entry.of for entry in again.plan.choice.values()] == [2] * 4
    assert joint.output(again.model).isfinite().all()


def test_each_kind_of_token_has_its_stream():
    model = sd3().model
    both, image_alone, _, last = (layer for _, layer in layers_of(model, HeadedAttention))
    block = model.transformer_blocks[0].attn

    assert [stream.tokens for stream in both.streams] == ["own", "text"]
    assert [getattr(*stream.value) for stream in both.streams] == [block.to_v, block.add_v_proj]
    assert both.outputs == (block.to_out[0], block.to_add_out)
    assert [stream.tokens for stream in image_alone.streams] == [stream.tokens for stream in last.streams] == ["own"]
    assert len(last.inputs) == 6
    mixed = layer_at(flux().model, "single_transformer_blocks.0", HeadedAttention)
    assert [stream.tokens for stream in mixed.streams] == ["both"]


def test_a_single_block_keeps_its_feed_forward():
    subject = flux()
    before = layer_at(subject.model, "single_transformer_blocks.0", FeedForward).hidden

    model = PruneHeads(share=0.5).apply(subject.copy(), Context()).model

    block = model.single_transformer_blocks[0]
    found = layer_at(model, "single_transformer_blocks.0", FeedForward)
    assert (found.hidden, found.first_column) == (before, 16)
    assert torch.equal(
        block.proj_out.weight[:, 16:], subject.model.single_transformer_blocks[0].proj_out.weight[:, 32:]
    )


def test_taylor_adds_what_a_head_says_to_image_and_text():
    """Without the text's part, the score of a head that speaks to the text alone would be 0."""
    subject = sd3()
    layers = {path: layer_at(subject.model, path, HeadedAttention) for path in subject.paths}
    with torch.no_grad():
        layers["transformer_blocks.1.attn"].output.weight.zero_()

    scores = taylor_scores(subject.model, layers, Context(calibration=[subject.inputs]))

    assert (scores["transformer_blocks.1.attn"] > 0).all()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda block: block.attn.fuse_projections(), "'to_qkv' may depend on the heads"),
        (lambda block: setattr(block.attn, "norm_q", torch.nn.RMSNorm(32)), "'norm_q' may depend on the heads"),
        (lambda block: setattr(block.attn, "processor", object()), "processor object may depend on the heads"),
        (lambda block: setattr(block.attn, "to_add_out", torch.nn.Linear(40, 32)), "projection reads 40 features"),
        (lambda block: setattr(block.attn, "add_k_proj", torch.nn.Identity()), "'add_k_proj' is a Identity"),
    ],
)
def test_a_variant_that_cannot_be_cut_says_why(spoil, reason):
    model = sd3().model
    spoil(model.transformer_blocks[1])

    fixed = dict(layers_of(model, FixedAttention))

    assert list(fixed) == ["transformer_blocks.1.attn"]
    assert reason in fixed["transformer_blocks.1.attn"].reason


def test_the_heads_of_the_published_networks_are_counted():
    """SD3-medium: 24 layers of 24 heads; FLUX.1-dev: 19 double and 38 single blocks of 24."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    with torch.device("meta"):
        medium = SD3Transformer2DModel(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
        )
        dev = FluxTransformer2DModel(guidance_embeds=True)

    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (medium, dev)]
    assert sizes == [2_028_328_000, 11_901_408_320]  # they are the networks that are meant
    counts = [[layer.heads for _, layer in layers_of(model, HeadedAttention)] for model in (medium, dev)]
    assert [sum(heads) for heads in counts] == [576, 1368]
    assert [len(heads) for heads in counts] == [24, 57]
