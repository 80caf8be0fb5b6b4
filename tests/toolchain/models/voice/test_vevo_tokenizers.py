from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from enginewright.models.voice.vevo import tokenizers

CONTENT = tokenizers.TINY_CONTENT
CONTENT_STYLE = tokenizers.TINY_CONTENT_STYLE


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def loud(net: nn.Module) -> None:
    """Weights that are large enough for every part to matter."""
    torch.manual_seed(0)
    net.eval().requires_grad_(False)
    for name, parameter in net.named_parameters():
        parameter.normal_(1.0 if name.endswith(("norm.weight", "gamma")) else 0.0, 0.15)


def content() -> tokenizers.ContentTokenizer:
    net = tokenizers.ContentTokenizer(CONTENT)
    loud(net)
    return net


def content_style() -> tokenizers.ContentStyleTokenizer:
    net = tokenizers.ContentStyleTokenizer(CONTENT_STYLE)
    loud(net)
    return net


def features(batch: int = 2, frames: int = 40) -> Tensor:
    return torch.randn(batch, frames, 32, generator=torch.Generator().manual_seed(1))


def test_the_published_content_tokenizer_has_the_counted_parameters() -> None:
    config = tokenizers.PUBLISHED["content"]
    with torch.device("meta"):
        encoder, decoder = tokenizers.ContentTokenizer(config), tokenizers.ContentDecoder(config)
    assert count(encoder) == 29_362_176  # 29.36 M
    assert count(encoder, decoder) == 58_724_352  # 58.72 M
    assert encoder.codebook.shape == (32, 1024)


def test_the_published_content_style_tokenizer_has_the_counted_parameters() -> None:
    """But for the scales of weight norm, one for each feature that the two projections write."""
    config = tokenizers.PUBLISHED["content-style"]
    with torch.device("meta"):
        encoder, decoder = tokenizers.ContentStyleTokenizer(config), tokenizers.ContentStyleDecoder(config)
    assert count(encoder) + 8 == 22_176_656  # 22.18 M
    assert count(encoder, decoder) + 8 + 1024 == 44_289_808  # 44.29 M


def test_a_content_code_is_the_nearest_in_euclidean_distance() -> None:
    net = content()
    x = features()
    net.codebook.copy_(net.encode(x)[0, ::5] * torch.linspace(0.5, 2, 8)[:, None])
    wanted = torch.cdist(net.encode(x).double(), net.codebook.double()[None]).argmin(-1)
    found = net(x)
    assert found.dtype == torch.int64
    assert len(found.unique()) > 3
    assert torch.equal(found, wanted)
    cosine = (F.normalize(net.encode(x), dim=-1) @ F.normalize(net.codebook, dim=-1).T).argmax(-1)
    assert not torch.equal(found, cosine)


def test_a_content_style_code_is_the_nearest_in_direction() -> None:
    net = content_style()
    x = features()
    net.codebook.weight.copy_(net.encode(x)[0, :32] * torch.linspace(0.2, 5, 32)[:, None])
    found = net(x)
    assert found[0, :32].tolist() == list(range(32))  # whatever their lengths
    cosine = F.cosine_similarity(net.encode(x)[:, :, None], net.codebook.weight, dim=-1)
    assert torch.equal(found, cosine.argmax(-1))
    assert not torch.equal(found, tokenizers.nearest(net.encode(x), net.codebook.weight))


def test_the_content_encoder_is_residual_units_of_elus_between_convolutions() -> None:
    net = content()
    x = features()
    first, *rest = net.encoder
    h = F.conv1d(x.mT, first.weight, padding=1)
    for block in (rest[:3], rest[3:]):
        for unit in block[:2]:
            y = F.conv1d(F.elu(h), unit.conv1.weight, padding=1)
            h = h + F.conv1d(F.elu(y), unit.conv2.weight)
        h = F.conv1d(h, block[2].weight, block[2].bias, padding=1)
    wanted = F.conv1d(h, net.projector.weight, padding=1).mT
    assert wanted.std() > 1
    torch.testing.assert_close(net.encode(x), wanted, rtol=1e-4, atol=1e-4)


def test_the_content_style_encoder_is_a_backbone_and_two_projections() -> None:
    net = content_style()
    x = features()
    wanted = F.linear(net.encoder(x.mT), net.out.weight, net.out.bias)
    wanted = F.linear(wanted, net.in_project.weight, net.in_project.bias)
    assert wanted.std() > 0.3
    torch.testing.assert_close(net.encode(x), wanted)


def test_decoders_turn_codes_vectors_back_into_features() -> None:
    """The content decoder runs the encoder's parts the other way round: a convolution first in every block."""
    decoder = tokenizers.ContentDecoder(CONTENT)
    loud(decoder)
    vectors = content().codebook[content()(features())]
    first, *blocks, last = decoder.decoder
    h = F.conv1d(vectors.mT, first.weight, padding=1)
    for convolution, *units in (blocks[:3], blocks[3:]):
        h = F.conv1d(h, convolution.weight, convolution.bias, padding=1)
        for unit in units:
            h = unit(h)
    wanted = F.conv1d(h, last.weight, padding=1).mT
    torch.testing.assert_close(decoder(vectors), wanted, rtol=1e-4, atol=1e-4)
    assert decoder(vectors).std() > 0.5

    style, tokenizer = tokenizers.ContentStyleDecoder(CONTENT_STYLE), content_style()
    loud(style)
    vectors = tokenizer.codebook(tokenizer(features()))
    assert style(vectors).shape == (2, 40, 32)
    torch.testing.assert_close(style(vectors), style.out(style.decoder(style.out_project(vectors).mT)))
