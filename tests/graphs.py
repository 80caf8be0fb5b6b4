"""Small ONNX graphs with trained-looking weights, built by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Weights with outputs of about unit variance."""
    scale = np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def write(
    path: Path,
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[str],
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 17,
    ir_version: int = 8,
    domains: Sequence[str] = (),
) -> Path:
    """Write a graph whose outputs are floats."""
    graph = helper.make_graph(
        nodes,
        "graph",
        inputs,
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def tensor(name: str, shape: Sequence[int | str | None] | None, kind: int = FLOAT) -> ValueInfoProto:
    """An input."""
    return helper.make_tensor_value_info(name, kind, shape)


def mixed(path: Path, opset: int = 17) -> Path:
    """Conv (a strided, padded one and a grouped one), Gemm of both kinds, MatMul, a product of two activations.

    x (batch, 4, 8, 8) -> y (batch, 16).
    """
    nodes = [
        helper.make_node("Conv", ["x", "conv.w", "conv.b"], ["c0"], name="conv", strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["c1"], name="relu"),
        helper.make_node("Conv", ["c1", "grouped.w"], ["c2"], name="grouped", group=4, pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c2"], ["c3"], name="pool"),
        helper.make_node("Flatten", ["c3"], ["c4"], name="flat"),
        helper.make_node("Gemm", ["c4", "gemm.w", "gemm.b"], ["g0"], name="gemm", transB=1),
        helper.make_node("Gemm", ["g0", "plain.w", "plain.b"], ["g1"], name="plain", alpha=0.5),
        helper.make_node("MatMul", ["g1", "matmul.w"], ["m0"], name="matmul"),
        helper.make_node("Transpose", ["m0"], ["m1"], name="turn"),
        helper.make_node("MatMul", ["m0", "m1"], ["s0"], name="scores"),
        helper.make_node("MatMul", ["s0", "m0"], ["s1"], name="mixing"),
        helper.make_node("MatMul", ["s1", "small.w"], ["y"], name="small"),
    ]
    weights = {
        "conv.w": noise(32, 4, 3, 3),
        "conv.b": noise(32, seed=1),
        "grouped.w": noise(32, 8, 3, 3, seed=2),
        "gemm.w": noise(48, 32, seed=3),
        "gemm.b": noise(48, seed=4),
        "plain.w": noise(32, 48, seed=5).T.copy(),
        "plain.b": noise(32, seed=8),
        "matmul.w": noise(32, 64, seed=6),
        "small.w": noise(64, 16, seed=7)[:, :4].copy(),
    }
    return write(path, nodes, [tensor("x", ["batch", 4, 8, 8])], ["y"], weights, opset=opset, ir_version=7)
