"""Attention with masks gives what PyTorch gives, also where a mask hides a whole row."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from enginewright.targets import translations
from enginewright.targets.onnx_export import export_onnx

KINDS = ("boolean", "infinite", "lowest", "grouped", "scaled")


class Attention(nn.Module):
    """Self-attention over padded sequences, in five ways: a hidden token neither looks nor is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mask = keep[:, None, :, None] & keep[:, None, None, :]
        zeros = torch.zeros(mask.shape, dtype=x.dtype)
        infinite = zeros.masked_fill(~mask, -torch.inf)
        lowest = zeros.masked_fill(~mask, torch.finfo(x.dtype).min)
        attend = nn.functional.scaled_dot_product_attention
        return (
            *(attend(q, k, v, attn_mask=each) for each in (mask, infinite, lowest)),
            attend(q, k[:, :2], v[:, :2], attn_mask=mask, enable_gqa=True),
            attend(q, k, v, attn_mask=mask, scale=0.3),
        )


def test_a_row_that_sees_nothing_is_what_it_is_in_pytorch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Attention().eval()
    axes = {0: ("batch", 1, 8), 1: ("tokens", 2, 32)}
    example = {"x": torch.randn(2, 6, 16), "keep": torch.ones(2, 6, dtype=torch.bool)}
    export_onnx(module, example, dynamic={"x": axes, "keep": axes}, outputs=KINDS, path=tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch, tokens in ((2, 6), (1, 2), (3, 9)):
        x, keep = torch.randn(batch, tokens, 16), torch.rand(batch, tokens) > 0.4
        keep[-1], keep[0, 0] = False, batch > 1
        found = session.run(None, {"x": x.numpy(), "keep": keep.numpy()})
        for kind, got, wanted in zip(KINDS, found, module(x, keep), strict=True):
            torch.testing.assert_close(
                torch.from_numpy(got),
                wanted.detach(),
                atol=1e-5,
                rtol=1e-5,
                msg=lambda text, kind=kind: f"{kind}: {text}",
            )


class Causal(nn.Module):
    """Attention without a mask, which no row can lose everything to."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def test_attention_without_a_mask_is_left_to_the_exporter(tmp_path: Path) -> None:
    export_onnx(Causal(), {"x": torch.randn(2, 2, 4, 8)}, dynamic={}, outputs=["y"], path=tmp_path / "m.onnx")
    assert "Not" not in [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]


def test_a_constant_mask_that_leaves_every_row_something_needs_no_care() -> None:
    import numpy as np
    import onnx_ir as ir

    def held(array: object) -> ir.Value:
        return ir.Value(name="m", const_value=ir.tensor(array), type=ir.TensorType(ir.DataType.BOOL))

    assert not translations.may_hide_a_row(held(np.tri(4, dtype=bool)))
    assert translations.may_hide_a_row(held(np.tri(4, k=-1, dtype=bool)))
