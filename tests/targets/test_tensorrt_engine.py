from __future__ import annotations

from pathlib import Path

from enginewright.targets.contract import Graph, LayerHint
from enginewright.targets.tensorrt_builder import refusal
from enginewright.targets.tensorrt_engine import TensorRt


def test_without_its_module_or_a_gpu_it_says_which_is_missing() -> None:
    able = TensorRt().availability()
    if not able.buildable.yes:
        assert any(word in able.why_not("buildable") for word in ("enginewright[tensorrt]", "NVIDIA", "not importable"))


def test_a_refusal_names_operators_or_the_first_error() -> None:
    log = ["[E] In node 1 with name: a and operator: NonZero (x)", "[E] In node 2 with name: b and operator: Det (x)"]
    assert refusal(log, "Parse") == "the parser refuses these operators: Det, NonZero"
    assert refusal(["[E] out of memory"], "Build") == "Build; out of memory"
    assert refusal([], "Build") == "Build"


def test_a_refusal_keeps_the_node_the_reason_and_what_helps() -> None:
    log = [
        "[E] ModelImporter.cpp:140: While parsing node number 0 [QuantizeLinear -> q]:",
        "[E] In node 0 with name: quantize_input and operator: QuantizeLinear (buildZeroPointTensor): INVALID_NODE: "
        "Assertion failed: shiftIsAllZeros(zeroPoint): Non-zero zero point is not supported. Please set kENABLE to …",
    ]
    assert refusal(log, "Parse") == (
        "the parser refuses these operators: QuantizeLinear; node 'quantize_input': Non-zero zero point is not "
        "supported; quantize symmetrically, with zero points of 0 (int8), as quantize_int8 does"
    )


def test_sparse_weights_are_asked_for_where_a_pass_made_some() -> None:
    plain = {"a": LayerHint(precision="int8")}
    sparse = {**plain, "b": LayerHint(pattern="2:4")}
    asked = [
        TensorRt().request(Graph(path=Path("m"), ranges={}, hints=h), Path("f"))["sparse"] for h in (plain, sparse)
    ]
    assert asked == [False, True]
