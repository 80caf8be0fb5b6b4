"""Weights that are rounded while activations are not, in ONNX Runtime on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from enginewright.passes.contract import Context
from enginewright.passes.quantization.quantize_weights import QuantizeWeights
from enginewright.targets.contract import Graph
from enginewright.targets.onnx_export import export_onnx
from enginewright.targets.onnxruntime_engine import OnnxRuntime


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_products_with_rounded_weights_are_those_of_the_plan_unless_fast_is_asked_for(
    weights: Literal["int4", "int8"], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    call = {"input": torch.randn(8, 64)}
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    module = QuantizeWeights(weights=weights, smallest=0).apply(model, Context(example=call)).model
    export_onnx(module, call, dynamic={}, outputs=["y"], path=tmp_path / "model.onnx")
    with torch.no_grad():
        wanted = module(**call).numpy()
    errors = {}
    for form in ("exact", "fast"):
        folder = tmp_path / "engines" / form
        folder.mkdir(parents=True)
        target = OnnxRuntime(weights_only=form)
        built = target.build(Graph(path=tmp_path / "model.onnx", ranges={}), folder)
        assert any(
            "weights_only=fast" in note if form == "exact" else "which no plan says" in note for note in built.notes
        )
        got = target.load(folder, threads=1)({"input": call["input"].numpy()})["y"]
        errors[form] = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    assert errors["exact"] < 1e-5
    assert errors["fast"] > 1e-4


def test_eight_bit_weights_are_multiplied_out_once_and_not_in_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    call = {"input": torch.randn(8, 64)}
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    module = QuantizeWeights(weights="int8", smallest=0).apply(model, Context(example=call)).model
    export_onnx(module, call, dynamic={}, outputs=["y"], path=tmp_path / "model.onnx")
    kinds, true = {}, onnxruntime.InferenceSession
    for form in ("exact", "fast"):

        def kept(path: Path, options: Any, form: str = form, **named: Any) -> Any:
            options.optimized_model_filepath = str(tmp_path / f"{form}.onnx")
            return true(path, options, **named)

        with monkeypatch.context() as patched:
            patched.setattr(onnxruntime, "InferenceSession", kept)
            OnnxRuntime(weights_only=form).open(tmp_path / "model.onnx", 1)
        kinds[form] = [node.op_type for node in ir.load(tmp_path / f"{form}.onnx").graph]
    assert not {"DequantizeLinear", "MatMulNBits"} & set(kinds["exact"])
    assert "MatMulNBits" in kinds["fast"]
