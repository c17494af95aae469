"""NF4 with double quantisation (Dettmers et al. 2023, QLoRA, sections 2 and 3) in the format of bitsandbytes, on two kernels.

Where the kernels of bitsandbytes do not run, as on a GPU that its wheel was not built for, plain PyTorch takes their place: it reads the
same bytes as the same weights. Neither keeps a dequantised weight.

Format: of a matrix, row by row, 64 numbers are a block, scaled by its largest absolute value. Each number is the nearest of 16 values; two
numbers are one byte, the first in the high bits. Of the scales, less their mean, 256 are a block in turn, and one byte each.

Shapes: O rows and I columns of a matrix, N its numbers, S its blocks, R some of its rows, B rows of an input.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, get_args

import torch
from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type, quantize_blockwise
from bitsandbytes.nn import Linear4bit, Params4bit
from torch.nn.functional import embedding, linear, pad

from edge_agent.errors import JobSchema

Kernel = Literal["bitsandbytes", "torch"]
KERNEL_VARIABLE = "EDGE_AGENT_NF4_KERNEL"
"""Names the environment's variable that forces a kernel; without it a trial decides."""
BLOCK, SCALES = 64, 256
"""Numbers of a block, and blocks of a block of scales."""
SLICE = 32 * BLOCK * SCALES
"""Numbers that are handled at once where bitsandbytes would take a whole matrix: 2 MiB in 32 bits."""
TRIAL_S = 120.0


def choose_kernel(device: str) -> Kernel:
    """Return the kernel for a device: that of the environment, else bitsandbytes where a trial gives what plain PyTorch gives.

    Raises JobSchema where the environment names no kernel.
    """
    return choose_with_reason(device)[0]


def choose_with_reason(device: str) -> tuple[Kernel, str]:
    """Return the kernel for a device, and why it is that one."""
    forced = os.environ.get(KERNEL_VARIABLE)
    if forced is None:
        why_not = _why_not(device)
        return ("bitsandbytes", "they agree with plain PyTorch") if why_not is None else ("torch", why_not)
    if forced not in get_args(Kernel):
        raise JobSchema(KERNEL_VARIABLE, f"{forced!r} is no kernel; give bitsandbytes or torch, or unset it")
    return forced, f"{KERNEL_VARIABLE} says so"  # type: ignore[return-value]


@cache
def _why_not(device: str) -> str | None:
    """Why the kernels of bitsandbytes are not taken. On a GPU a process of its own tries: one that is not built for it ends the process."""
    if device == "cpu":
        return disagreement(device)
    trial = f"import sys; from quantization.nf4 import disagreement; sys.exit(disagreement({device!r}))"
    try:
        done = subprocess.run([sys.executable, "-c", trial], capture_output=True, text=True, timeout=TRIAL_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"a trial of bitsandbytes took longer than {TRIAL_S:.0f} s"
    last = done.stderr.strip().rpartition("\n")[2][-300:]  # what it was ended with, text or error
    return f"a trial of bitsandbytes ended with {done.returncode}: {last}" if done.returncode else None


def disagreement(device: str) -> str | None:
    """Return why bitsandbytes does not quantise, multiply and form gradients as plain PyTorch does, to the rounding of the products."""
    generator, kernels = torch.Generator().manual_seed(0), get_args(Kernel)
    weight_OI, input_BI = (torch.randn(n, 256, generator=generator).to(device) for n in (64, 8))
    try:
        weights: list[Params4bit] = [quantize(weight_OI, torch.float32, kernel) for kernel in kernels]
        layer = Linear4bit(256, 64, bias=False, compute_dtype=torch.float32, device="meta")
        found = []
        for weight, kernel in zip(weights[:1] * 2 + weights[1:], kernels + kernels[1:], strict=True):
            layer.weight = weight
            use_kernel(layer, kernel)
            input_BI = input_BI.detach().requires_grad_()
            output_BO = layer(input_BI)
            found += [output_BO.detach(), *torch.autograd.grad(output_BO.square().sum(), input_BI)]
    except (RuntimeError, OSError, AttributeError) as error:
        return f"bitsandbytes fails: {(str(error).strip().splitlines() or [type(error).__name__])[0][:300]}"
    if all(float((a - b).norm()) < 1e-2 * float(b.norm()) for a, b in zip(found[:4], found[2:], strict=True)):
        return None
    return "bitsandbytes computes something else than plain PyTorch"


def quantize(weight_OI: torch.Tensor, dtype: torch.dtype, kernel: Kernel) -> Params4bit:
    """Return a matrix in NF4, to be computed with in `dtype`. It is rounded to bfloat16 first, whatever its file holds.

    So the same model is the same on every device. Beside the result at most `SLICE` numbers in 32 bits exist a few times.
    """
    whole_N = weight_OI.reshape(-1)
    # What stays is allocated before what goes, so that the memory between is not lost in holes.
    packed = torch.empty((len(whole_N) + 1) // 2, 1, dtype=torch.uint8, device=weight_OI.device)
    scale_S = torch.empty(-(-len(whole_N) // BLOCK), device=weight_OI.device)
    for start in range(0, len(whole_N), SLICE):
        codes, scales = _quantize_slice(whole_N[start : start + SLICE].to(torch.bfloat16), kernel)
        packed[start // 2 : start // 2 + len(codes)], scale_S[start // BLOCK : start // BLOCK + len(scales)] = codes, scales
    mean = scale_S.mean()
    second = _quantize_scales if kernel == "torch" else quantize_blockwise
    scale_codes_S, of_scales = second(scale_S - mean, blocksize=SCALES)
    state = QuantState(
        scale_codes_S, weight_OI.shape, get_4bit_type("nf4", device=weight_OI.device), BLOCK, "nf4", dtype, mean, of_scales
    )  # fmt: skip
    return Params4bit(packed, False, state, BLOCK, True, "nf4", bnb_quantized=True)


def _quantize_slice(part_N: torch.Tensor, kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bytes of some blocks, N/2 x 1, and their scales."""
    if kernel == "bitsandbytes" and part_N.device.type != "cpu":  # on CPUs it has plain PyTorch as well, for the same bytes in more time
        packed, scale_S = torch.ops.bitsandbytes.quantize_4bit(part_N, BLOCK, "nf4", torch.uint8)
        return packed, scale_S
    scaled_N, scale_S = _scale_down(part_N.float(), BLOCK)
    codes_N = torch.zeros(len(part_N) + len(part_N) % 2, dtype=torch.uint8, device=part_N.device)
    for bound in _bounds(get_4bit_type("nf4", device="cpu")).tolist():
        codes_N[: len(part_N)] += scaled_N > bound
    return (codes_N[::2] << 4 | codes_N[1::2])[:, None], scale_S


def _quantize_scales(scale_S: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, QuantState]:
    """Return a byte for each scale, and the scales of their blocks; close to the middle bitsandbytes may choose the other neighbour."""
    values = create_dynamic_map().to(scale_S.device)
    scaled_S, largest = _scale_down(scale_S, blocksize)
    codes_S = torch.bucketize(scaled_S, _bounds(values), out_int32=True).to(torch.uint8)
    return codes_S, QuantState(largest, code=values, blocksize=blocksize, dtype=torch.float32)


def _scale_down(numbers_N: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers in the scale of their blocks, -1 to 1, and the scales."""
    blocks = pad(numbers_N, (0, -len(numbers_N) % block)).view(-1, block)
    largest = blocks.abs().amax(1)
    return (blocks * (1 / largest.clamp(min=1e-38))[:, None]).view(-1)[: len(numbers_N)], largest


def _bounds(values: torch.Tensor) -> torch.Tensor:
    """Return the middles between neighbours."""
    return (values[1:] + values[:-1]) / 2


def dequantize(weight: Params4bit, dtype: torch.dtype, kernel: Kernel = "torch") -> torch.Tensor:
    """Return the matrix, O x I."""
    whole_OI = torch.empty(weight.quant_state.shape, dtype=dtype, device=weight.device)
    for rows, part_RI in row_slices(weight, dtype, kernel):
        whole_OI[rows] = part_RI
    return whole_OI


def row_slices(weight: Params4bit, dtype: torch.dtype, kernel: Kernel) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the matrix in slices of whole rows of about `SLICE` numbers, R x I each."""
    state: Any = weight.quant_state
    height, width = state.shape
    packed_N, scale_S = weight.data.view(-1), _scales(state)
    # A slice begins with a block.
    least = state.blocksize // math.gcd(state.blocksize, width)
    step = least * max(1, SLICE // (least * width))
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        first, last = rows.start * width, rows.stop * width
        packed, scales = packed_N[first // 2 : (last + 1) // 2], scale_S[first // state.blocksize : -(-last // state.blocksize)]
        shape = (rows.stop - rows.start, width)
        if kernel == "bitsandbytes" and _aligned(width):
            yield rows, torch.ops.bitsandbytes.dequantize_4bit(packed, scales, state.blocksize, state.quant_type, shape, dtype)
        else:
            numbers_N = embedding(packed.int(), _pairs(state.code)).view(-1)[: math.prod(shape)]
            yield rows, _scaled(numbers_N, scales, state.blocksize).view(shape).to(dtype)


def _pairs(code: torch.Tensor) -> torch.Tensor:
    """Return the two numbers of every byte, 256 x 2."""
    return torch.stack([code.repeat_interleave(16), code.repeat(16)], 1)


def _scaled(numbers_N: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    blocks = pad(numbers_N, (0, -len(numbers_N) % block)).view(-1, block) * scales[:, None]
    return blocks.view(-1)[: len(numbers_N)]


def _scales(state: Any) -> torch.Tensor:
    """Return the scales of all blocks in 32 bits."""
    if not state.nested:
        return state.absmax.float()  # type: ignore[no-any-return]
    codes_S = embedding(state.absmax.int(), state.state2.code[:, None])[:, 0]
    scale_S: torch.Tensor = _scaled(codes_S, state.state2.absmax, state.state2.blocksize) + state.offset
    return scale_S


def dequantize_rows(weight: Params4bit, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the rows of the given numbers, in a shape of `ids` x I; of an even width. The rest of the matrix is not touched."""
    state: Any = weight.quant_state
    width = state.shape[1]
    packed_RI = weight.data.view(-1, width // 2)[ids.flatten()]
    blocks = (ids.flatten()[:, None] * width + torch.arange(0, width, 2, device=ids.device)) // BLOCK
    scales = state.state2.code[state.absmax[blocks].int()] * state.state2.absmax[blocks // SCALES] + state.offset
    numbers: torch.Tensor = embedding(packed_RI.int(), _pairs(state.code)) * scales[..., None]
    return numbers.view(*ids.shape, width).to(dtype)


def use_kernel(model: torch.nn.Module, kernel: Kernel) -> None:
    """Have all NF4 layers of a model compute with a kernel.

    The kernel of bitsandbytes is kept from repacking weights in place for CPUs with AVX512-BF16. With it, one forward pass without gradient
    in `.eval()` leaves a layer whose backward pass gives no gradient to its input: evaluating and then training would be silently wrong.
    """
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu, module.kernel = False, kernel
            if type(module) is Linear4bit and (kernel == "torch" or not _aligned(module.in_features)):
                module.__class__ = TorchLinear  # the storage stays that of bitsandbytes


def kernel_of(model: torch.nn.Module) -> Kernel:
    """Return the kernel of a model's NF4 layers; those whose rows do not begin with a block compute in plain PyTorch in any case."""
    kernel: Kernel = next(module.kernel for module in model.modules() if isinstance(module, Linear4bit))
    return kernel


def _aligned(width: int) -> bool:
    """Whether each row begins with a block. Where it does not, bitsandbytes 0.50 gives wrong weights on CPUs with AVX-512."""
    return width % BLOCK == 0


class TorchLinear(Linear4bit):  # type: ignore[misc]
    """The layer of bitsandbytes on plain PyTorch: the matrix is dequantised for the forward pass, and again for the backward pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product with the layer's matrix, in the type of the input."""
        dtype = self.compute_dtype or x.dtype
        product: torch.Tensor = _Product.apply(x.to(dtype), self.weight)  # type: ignore[no-untyped-call]
        return (product if self.bias is None else product + self.bias.to(dtype)).to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_BI: torch.Tensor, weight: Params4bit) -> torch.Tensor:
        ctx.weight = weight
        return linear(input_BI, dequantize(weight, input_BI.dtype))

    @staticmethod
    def backward(ctx: Any, grad_BO: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_BO @ dequantize(ctx.weight, grad_BO.dtype), None
