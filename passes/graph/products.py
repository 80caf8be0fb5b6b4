"""Products of an ONNX graph with constant weights: MatMul, Gemm and Conv, seen as x (R, K) times weight (N, K).

Shapes: R rows, K inputs, N outputs, B batch, C channels, G groups of a convolution, P positions of its kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, nn

from enginewright.passes.kernel.graph_module import PAIR
from enginewright.passes.kernel.statistics import InputStatistics, rows_of

KINDS = ("MatMul", "Gemm", "Conv")
PATCHES = 256
"""Places of a convolution's input that are kept of all calibration calls together."""
IN_8_BITS = ("QLinearMatMul", "QLinearConv", "MatMulInteger", "ConvInteger")


@dataclass(frozen=True)
class Product:
    """A node, what flows into it, and its constant weight."""

    node: ir.Node
    activation: ir.Value
    weight: ir.Value

    @property
    def is_convolution(self) -> bool:
        """Whether x is (B, C, …) and not (…, K)."""
        return self.node.op_type == "Conv"

    def constant(self) -> Tensor:
        """The weight as it stands in the graph."""
        assert self.weight.const_value is not None
        return torch.tensor(self.weight.const_value.numpy())

    def matrix(self) -> Tensor:
        """The weight as (N, K), a Gemm's alpha in it. A convolution's K runs over positions, then channels."""
        weight = self.constant()
        if self.is_convolution:
            return weight.movedim(1, -1).flatten(1)
        if self.node.op_type == "MatMul":
            return weight.T
        weight = weight * self.node.attributes.get_float("alpha", 1.0)
        return weight if self.node.attributes.get_int("transB", 0) else weight.T

    def look(self, x: Tensor, seen: InputStatistics) -> None:
        """Add the input of one call: (…, K), or (B, C, …) for a convolution, whose rows are patches (P * C)."""
        if not self.is_convolution:
            seen.add(rows_of(x))
            return
        kernel = self.constant().shape[2:]
        look_at_patches(x, kernel, self.node.attributes.get_ints("dilations", [1] * len(kernel)), seen)

    def look_at_output(self, y: Tensor, seen: InputStatistics) -> None:
        """Add a convolution's output y (B, N, …) of one call."""
        seen.add(rows_of(y.movedim(1, -1)))

    def by_group(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rows and weights of each group that is multiplied for itself: (R, K) and (N / G, K)."""
        if not self.is_convolution:
            return [(rows, self.matrix())]
        groups = self.node.attributes.get_int("group", 1)
        parts = rows.unflatten(1, (-1, groups, self.constant().shape[1]))  # (R, P, G, C / G)
        return [(parts[:, :, g].flatten(1), part) for g, part in enumerate(self.matrix().chunk(groups))]


def look_at_patches(x: Tensor, kernel: Sequence[int], dilations: Sequence[int], seen: InputStatistics) -> None:
    """Add what a convolution's kernel sees of x (B, C, …): every value counts, and rows are patches (P * C)."""
    seen.count(x.reshape(-1, 1))
    reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    missing = [max(0, r - size) for r, size in zip(reach, x.shape[2:], strict=True)]
    x = nn.functional.pad(x, [side for more in reversed(missing) for side in (0, more)])
    last = [size - r for r, size in zip(reach, x.shape[2:], strict=True)]
    room = [x.shape[0], *(place + 1 for place in last)]

    def patch(batch: int, *starts: int) -> Tensor:
        window = [slice(s, s + r, d) for s, r, d in zip(starts, reach, dilations, strict=True)]
        return x[batch][(slice(None), *window)].movedim(0, -1).flatten()

    def patches(places: Tensor) -> Tensor:
        return torch.stack([patch(*place) for place in torch.stack(torch.unravel_index(places, room), dim=1).tolist()])

    def largest() -> Tensor:
        batch, _, *highest = torch.unravel_index(x.abs().argmax(), x.shape)
        return patch(int(batch), *(min(int(at), most) for at, most in zip(highest, last, strict=True)))

    seen.sample.offer(math.prod(room), patches)
    seen.largest.offer(float(x.abs().max()), largest)


def product_of(node: ir.Node) -> Product | str:
    """A MatMul, Gemm or Conv as a product with a constant weight, or why it is none."""
    activation, weight = node.inputs[0], node.inputs[1]
    assert activation is not None
    assert weight is not None
    producer = weight.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return "is already quantized"
    if weight.const_value is None:
        left = activation.const_value is not None
        return "its constant weight stands on the left" if left else "has no constant weight"
    if activation.const_value is not None:
        return "both its inputs are constant"
    if weight.dtype != ir.DataType.FLOAT:
        return f"its weight is {weight.dtype}; only FLOAT is quantized"
    if node.op_type == "MatMul" and weight.const_value.shape.rank() != 2:
        return f"its weight has {weight.const_value.shape.rank()} dimensions; only 2 are quantized"
    if node.op_type == "Gemm":
        if node.attributes.get_int("transA", 0):
            return "transposes its input (transA)"
        if len(node.inputs) > 2 and node.attributes.get_float("beta", 1.0) != 1:
            return f"scales its bias by beta = {node.attributes.get_float('beta', 1.0):g}"
    return Product(node, activation, weight)


def reason_for_other(node: ir.Node, smallest: int) -> str:
    """Why a node of another kind that holds weights stays as it is; empty when it holds none to speak of."""
    if node.op_type in IN_8_BITS:
        return f"{node.op_type}: already works in 8 bits"
    if node.op_type in PAIR:
        return ""
    constants = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    if any(c.dtype.is_floating_point() and c.shape.rank() > 1 and c.size >= max(smallest, 1) for c in constants):
        return f"{node.op_type}: only {', '.join(KINDS)} are quantized"
    return ""
