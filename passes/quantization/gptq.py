"""GPTQ: round weights one input at a time, and let the inputs not yet rounded make up for each error.

Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1 and section 3.3 (Cholesky form, updates batched in steps).
Departures: no reordering of inputs; the damping of 1 % of the mean diagonal grows tenfold where that is not enough.

Shapes: K inputs, N outputs, B inputs that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from enginewright.passes.quantization.blocks import Blocks, Weights, as_codes, block_scales, round_to

DAMPING = 0.01
"""Share of the mean diagonal that is added to the Hessian's."""


def inverse_factor(products: Tensor) -> Tensor:
    """Upper Cholesky factor (K, K) of the inverse of the damped Hessian, X^T X (K, K) over all inputs.

    An input that is always zero gets a one on the diagonal, as in the authors' code: its weights matter nothing.
    """
    hessian = products.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    added = DAMPING * float(diagonal.mean())
    for _ in range(6):
        damped = hessian + added * torch.eye(len(hessian), dtype=hessian.dtype)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return upper
        added *= 10
    raise AssertionError("a damped Hessian is positive definite")


def gptq(weight: Tensor, products: Tensor, weights: Weights, block: int) -> Blocks:
    """Round a weight (K, N) for inputs of which X^T X (K, K) is given.

    The scales of a block are chosen when its turn comes, from the weights as they then are; those of nvfp4, which
    share a scale, from the weights as they were.
    """
    upper = inverse_factor(products)
    left = weight.double().clone()
    codes = torch.empty_like(left)
    scales, scale = block_scales(weight.float(), weights, block)
    for start in range(0, len(left), block):
        end = start + block
        number = start // block
        if scale is None:
            scales[number] = block_scales(left[start:end].float(), weights, block)[0][0]
        wide = Blocks(codes, scales[number], scale).float_scales().double()  # (N,)
        errors = torch.empty_like(left[start:end])
        for k in range(start, end):
            codes[k] = round_to(torch.where(wide > 0, left[k] / wide, 0.0), weights)
            errors[k - start] = (left[k] - codes[k] * wide) / upper[k, k]
            left[k + 1 : end] -= upper[k, k + 1 : end, None] * errors[k - start]
        left[end:] -= upper[start:end, end:].T @ errors
    return Blocks(as_codes(codes, weights), scales, scale)
