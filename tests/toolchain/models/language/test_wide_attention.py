from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from enginewright.models.language import wide_attention
from enginewright.passes.contract import macs_of_shapes
from enginewright.targets.onnx_export import export_onnx

TINY = wide_attention.TINY
DEEP, WIDE = wide_attention.PUBLISHED["deep"], wide_attention.PUBLISHED["wide"]


def meta(config: wide_attention.Config) -> Any:
    with torch.device("meta"):
        return wide_attention.build(config)


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def loud(config: wide_attention.Config = TINY) -> Any:
    """A network whose weights are so large that every mechanism speaks up."""
    torch.manual_seed(1)
    network = wide_attention.build(config).eval().requires_grad_(False)
    for weight in network.parameters():
        weight.normal_(std=1.5 * weight.shape[1] ** -0.5 if weight.dim() == 2 else 0.7)
    return network


def call(*shape: int) -> tuple[Tensor, Tensor]:
    """Ids of some shape, and a mask that hides the last two tokens of each second document."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[1::2, ..., 3:][..., -2:] = False
    return torch.randint(0, TINY.vocabulary, shape, generator=generator), mask


class LargestOutput(TorchDispatchMode):
    """Notes how many elements the largest tensor has that an operation gives."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return found


@pytest.mark.parametrize(
    ("size", "wanted"),
    [("deep", 21_146_626), ("wide", 10_635_266), ("matcher-deep", 21_149_698), ("matcher-wide", 10_638_338)],
)
def test_a_size_has_the_counted_parameters(size: str, wanted: int) -> None:
    config = wide_attention.PUBLISHED[size]
    d, inner, f, layers = 512, 64 * config.heads, 2048, config.layers
    layer = 3 * d * inner + 3 * inner + inner * d + d + 2 * d * f + f + d + 4 * d
    tables = (260 + 4096) * d
    head = 2 * d * (4 if config.documents == 2 else 1) + 2
    assert count(meta(config)) == layers * layer + tables + 2 * d + head == wanted


def test_wide_has_the_heads_of_deep_in_one_layer_and_otherwise_the_same() -> None:
    assert replace(DEEP, layers=WIDE.layers, heads=WIDE.heads) == WIDE
    assert DEEP.layers * DEEP.heads == WIDE.layers * WIDE.heads == 48
    deep, wide = meta(DEEP), meta(WIDE)
    assert [layer.attn.qkv.weight.shape for layer in wide.encoder.layers] == [(3 * 3072, 512)]
    assert wide.encoder.layers[0].attn.proj.weight.shape == (512, 3072)
    weights = [sum(p.numel() for p in network.encoder.layers.parameters() if p.dim() == 2) for network in (deep, wide)]
    assert weights == [12 * 6 * 512**2, (4 * 6 + 8) * 512**2]  # 0.44 of deep
    assert 0.49 < count(wide) / count(deep) < 0.51


def test_attention_is_the_same_work_and_five_mlps_are_saved() -> None:
    n = 1024
    example = {
        "ids": torch.zeros(1, n, dtype=torch.long, device="meta"),
        "mask": torch.ones(1, n, device="meta").bool(),
    }
    deep, wide = (macs_of_shapes(meta(config), example) for config in (DEEP, WIDE))
    assert deep is not None
    assert wide is not None
    attention = 48 * (4 * n * 512 * 64 + 2 * n**2 * 64)
    mlp = n * 2 * 512 * 2048
    assert (deep, wide) == (attention + 6 * mlp + 1024, attention + mlp + 1024)


def test_a_stack_as_wide_as_its_tokens_is_the_encoder_of_torch() -> None:
    config = replace(TINY, layers=2, heads=2)  # two heads of 8 for tokens of 16
    network, (ids, mask) = loud(config), call(2, 9)
    plain = nn.TransformerEncoderLayer(16, 2, 32, 0.0, nn.GELU(approximate="tanh"), batch_first=True, norm_first=True)
    x = network.encoder.embedding(ids) + network.encoder.positions[:9]
    for layer in network.encoder.layers:
        parts = (layer.attn.qkv, layer.attn.proj, layer.mlp.fc1, layer.mlp.fc2, layer.norm1, layer.norm2)
        ours = [weight for part in parts for weight in (part.weight, part.bias)]
        for theirs, weight in zip(plain.parameters(), ours, strict=True):
            theirs.data.copy_(weight)
        x = plain(x, src_key_padding_mask=~mask)
    x = network.encoder.norm(x)
    wanted = torch.stack([x[0].mean(0), x[1, :7].mean(0)])
    torch.testing.assert_close(network.encoder(ids, mask), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(ids, mask), network.head(wanted), rtol=1e-4, atol=1e-4)


def test_a_wide_layer_adds_up_what_its_heads_say() -> None:
    attention, x = loud().encoder.layers[0].attn, torch.randn(2, 9, 16)
    bias = torch.zeros(2, 1, 1, 9)
    bias[1, ..., 7:] = torch.finfo().min
    wanted = attention.proj.bias.expand(2, 9, 16).clone()
    weight, offset = attention.qkv.weight.view(3, 6, 8, 16), attention.qkv.bias.view(3, 6, 1, 8)
    for head in range(6):
        q, k, v = (x @ weight[i, head].T + offset[i, head] for i in range(3))
        seen = (q @ k.transpose(1, 2) / 8**0.5 + bias[:, 0]).softmax(dim=2)
        wanted += seen @ v @ attention.proj.weight[:, 8 * head : 8 * head + 8].T
    torch.testing.assert_close(attention(x, bias), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at_once", [1, 4, 5, 6, 48])
def test_heads_a_few_at_a_time_give_what_all_give(at_once: int) -> None:
    network, (ids, mask) = loud(), call(2, 9)
    wanted = network(ids, mask)
    network.encoder.layers[0].attn.heads_at_once = at_once
    torch.testing.assert_close(network(ids, mask), wanted, rtol=1e-5, atol=1e-5)


def test_heads_in_another_order_with_the_columns_that_read_them_change_nothing() -> None:
    network, (ids, mask) = loud(), call(2, 9)
    attention, order = network.encoder.layers[0].attn, torch.tensor([3, 0, 5, 4, 1, 2])
    wanted = network(ids, mask)
    attention.qkv.weight.copy_(attention.qkv.weight.view(3, 6, 8, 16)[:, order].flatten(0, 2))
    attention.qkv.bias.copy_(attention.qkv.bias.view(3, 6, 8)[:, order].flatten())
    assert (network(ids, mask) - wanted).abs().max() > 0.05
    attention.proj.weight.copy_(attention.proj.weight.view(16, 6, 8)[:, order].flatten(1))
    torch.testing.assert_close(network(ids, mask), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_once", [6, 2])
def test_scores_are_never_stored_or_without_fused_attention_those_of_a_few_heads(at_once: int) -> None:
    network, ids = loud(replace(TINY, heads_at_once=at_once, longest=512)), torch.zeros(1, 512, dtype=torch.long)
    found = []
    for backends in ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], [SDPBackend.MATH]):
        with sdpa_kernel(backends), LargestOutput() as noted:
            network(ids, torch.ones(1, 512, dtype=torch.bool))
        found.append(noted.largest)
    assert found[0] < 512 * 512
    assert found[1] == at_once * 512 * 512


def test_padding_changes_nothing_and_tokens_do() -> None:
    network, (ids, mask) = loud(), call(2, 9)
    wanted = network(ids, mask)
    other = ids.clone()
    other[1, 7:] = (other[1, 7:] + 5) % 20
    torch.testing.assert_close(network(other, mask), wanted)
    torch.testing.assert_close(network(ids[1:, :7], mask[1:, :7]), wanted[1:], rtol=1e-5, atol=1e-5)
    everything = torch.ones_like(mask)
    assert (network(ids, everything)[1] - wanted[1]).abs().max() > 0.05
    assert (network(other, everything)[1] - network(ids, everything)[1]).abs().max() > 0.05


def test_the_order_of_tokens_matters_and_a_document_of_padding_gets_finite_logits() -> None:
    network, (ids, mask) = loud(), call(1, 9)
    assert (network(ids.flip(1), mask) - network(ids, mask)).abs().max() > 0.05
    for dtype in (torch.float32, torch.bfloat16):
        nothing = network.to(dtype)(ids, torch.zeros_like(mask))
        torch.testing.assert_close(nothing, network.head.bias[None])


def test_a_matcher_reads_both_documents_with_one_encoder_and_tells_them_apart() -> None:
    network, (ids, mask) = loud(replace(TINY, documents=2)), call(2, 2, 9)
    wanted = network(ids, mask)
    one, two = (network.encoder(ids[:, i], mask[:, i]) for i in (0, 1))
    pair = network.head(torch.cat([one, two, one * two, one - two], dim=1))
    torch.testing.assert_close(wanted, pair, rtol=1e-4, atol=1e-4)
    assert (network(ids.flip(1), mask.flip(1)) - wanted).abs().amax(1).min() > 0.05
    for document in (0, 1):
        other = ids.clone()
        other[:, document, 0] = (other[:, document, 0] + 5) % 20
        assert (network(other, mask) - wanted).abs().amax(1).min() > 0.02


@pytest.mark.parametrize("documents", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_exported_network_takes_documents_of_any_length(documents: int, tmp_path: Path) -> None:
    config, path = replace(TINY, documents=documents), tmp_path / "model.onnx"
    network, shape = loud(config), (3, 9) if documents == 1 else (3, 2, 9)
    ids, mask = call(*shape)
    axes = {0: ("batch", 1, 4), len(shape) - 1: ("tokens", 1, 64)}
    dynamic = {"ids": axes, "mask": axes}
    export_onnx(
        network, {"ids": ids, "mask": mask}, dynamic=dynamic, outputs=wide_attention.OUTPUTS, path=path, embed=True
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, tokens in ((1, 1), (1, 16), (3, 7), (4, 64)):
        ids, mask = call(batch, *shape[1:-1], tokens)
        found = torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])
        wanted = network(ids, mask)
        assert wanted.std() > 0.05
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
