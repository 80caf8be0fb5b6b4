from __future__ import annotations

import pytest
import torch

from enginewright.models.diffusion.csd_var import text
from tests.toolchain.models.diffusion.csd_var_networks import loud, numel


def test_encoders_have_the_parameters_of_both_clips_with_eight_learned_tokens() -> None:
    with torch.device("meta"):
        net = text.Text(text.PUBLISHED["clip-l-bigg"])
    assert numel(net.first) == 123_060_480 + text.LEARNED * 768
    assert numel(net.second) == 693_021_440 + text.LEARNED * 1280
    assert net.first.projection.shape == (768, 768)


@pytest.mark.parametrize("which", ["first", "second"])
def test_the_same_weights_give_the_outputs_of_transformers_clip(which: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    size: text.Clip = getattr(text.TINY, which)
    theirs = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=text.TINY.vocabulary + text.LEARNED,
            hidden_size=size.width,
            num_hidden_layers=size.depth,
            num_attention_heads=size.heads,
            intermediate_size=size.hidden,
            hidden_act="quick_gelu" if size.activation == "quick" else "gelu",
            max_position_embeddings=text.TINY.text,
            eos_token_id=text.TINY.end,
        )
    ).eval()
    net = loud(text.Text(text.TINY))
    encoder = getattr(net, which)
    names = {name: name.replace("o_proj", "out_proj") for name in encoder.state_dict() if name != "projection"}
    given = {}
    for name, there in names.items():
        short = there.replace("layers.", "encoder.layers.") if there.startswith("layers.") else there
        short = f"embeddings.{short}" if "embedding" in short else short
        given[next(key for key in theirs.state_dict() if key.endswith(short))] = encoder.state_dict()[name]
    theirs.load_state_dict(given, strict=True)
    ids = torch.randint(0, 40, (2, 7))
    ids[0, 4], ids[1, 6] = text.TINY.end, text.TINY.end
    with torch.no_grad():
        wanted = theirs(ids)
    torch.testing.assert_close(encoder(ids), wanted.last_hidden_state, rtol=1e-4, atol=1e-5)
    if which == "second":
        _, pooled = net(ids, ids, torch.zeros(2, 7, dtype=torch.bool))
        torch.testing.assert_close(pooled, wanted.pooler_output, rtol=1e-4, atol=1e-5)


def test_what_the_content_says_is_taken_out_of_the_styles_tokens_alone() -> None:
    net = loud(text.Text(text.TINY))
    contents = [torch.randn(30, encoder.projection.shape[0]) for encoder in (net.first, net.second)]
    ids, style = torch.randint(0, 58, (2, 7)), torch.zeros(2, 7, dtype=torch.bool)
    style[:, 2:5] = True
    plain, pooled = net(ids, ids, style)
    for encoder, features in zip((net.first, net.second), contents, strict=True):
        encoder.projection.copy_(text.content_projection(features, 3))
    rectified, same = net(ids, ids, style)
    assert torch.equal(pooled, same)
    assert torch.equal(rectified[~style], plain[~style])
    assert (rectified[style] - plain[style]).abs().mean() > 0.1
    for part, encoder in zip(rectified.split([8, 16], dim=2), (net.first, net.second), strict=True):
        assert (part[style] @ encoder.projection).abs().max() < 1e-5
        assert (part[~style] @ encoder.projection).abs().mean() > 0.1


def test_a_projection_keeps_the_strongest_directions_and_no_others() -> None:
    features = torch.randn(30, 2) @ torch.eye(6)[:2] * 10 + 0.01 * torch.randn(30, 6)
    found = text.content_projection(features, 2)
    torch.testing.assert_close(found, torch.diag(torch.tensor([1.0, 1, 0, 0, 0, 0])), rtol=0, atol=0.02)
    torch.testing.assert_close(found @ found, found)
    assert torch.linalg.matrix_rank(text.content_projection(torch.randn(200, 24))) == text.RANK
