"""A matrix in NF4 tried out on a device, on the kernel that a trainer would take: `python -m quantization.smoke DEVICE DTYPE`.

It is quantised, multiplied with, and a gradient formed through it; each is held against dense matrices in plain PyTorch and 32 bits.

Shapes: O rows and I columns of the matrix, B rows of an input.
"""

from __future__ import annotations

import json
import sys

import torch
from bitsandbytes.nn import Linear4bit

from profiles.device import device_name
from quantization.nf4 import choose_with_reason, dequantize, quantize, use_kernel

O_ROWS, I_COLUMNS, B_ROWS = 192, 512, 16
FOUR_BITS, ROUNDING = 0.11, 0.02
"""Relative errors: of normal numbers in NF4, and of products in 16 bits."""


def try_out(device: str, dtype: torch.dtype) -> dict[str, str]:
    """Return the kernel, why it is that one, and what was wrong, empty where nothing was. Raises what PyTorch does."""
    kernel, why = choose_with_reason(device)
    generator = torch.Generator().manual_seed(0)
    weight_OI, input_BI = (torch.randn(n, I_COLUMNS, generator=generator).to(device) for n in (O_ROWS, B_ROWS))
    layer = Linear4bit(I_COLUMNS, O_ROWS, bias=False, compute_dtype=dtype, device="meta")
    layer.weight = quantize(weight_OI, dtype, kernel)
    use_kernel(layer, kernel)
    dense_OI = dequantize(layer.weight, torch.float32)
    given_BI, dense_BI = (input_BI.to(kind).requires_grad_() for kind in (dtype, torch.float32))
    given_BO, dense_BO = layer(given_BI), dense_BI @ dense_OI.T
    given_grad_BI, dense_grad_BI = (
        torch.autograd.grad(output_BO.float().square().sum(), rows_BI)[0]
        for output_BO, rows_BI in ((given_BO, given_BI), (dense_BO, dense_BI))
    )
    wrong = [
        f"{what} is off by {off:.2g}"
        for what, found, wanted, most in (
            ("the matrix", dense_OI, weight_OI, FOUR_BITS),
            ("the product", given_BO.detach().float(), dense_BO.detach(), ROUNDING),
            ("the gradient", given_grad_BI.float(), dense_grad_BI, ROUNDING),
        )
        if not (off := float((found - wanted).norm() / wanted.norm())) < most
    ]
    return {"kernel": kernel, "why": why, "device": device_name(device), "wrong": ", ".join(wrong)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(try_out(sys.argv[1], getattr(torch, sys.argv[2]))))
