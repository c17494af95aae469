"""A frozen NF4 matrix and its LoRA matrices as one operation, with its gradient.

PEFT's own layer copies the output, then scales and adds the low-rank part in tensors of the output's size, and keeps a copy of the input
in 32 bits. Here the low-rank part is added in place, and of the activations only the input and its low-rank image are kept. They are kept
before the product is made, as an operation of its own: a checkpointed decoder layer, computed again for its gradient, ends as soon as all
is kept again, and so without the product of its last matrix, a fifth of its work or more. Not where something after it keeps anything, such
as a norm.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora.bnb import Linear4bit

from quantization.nf4 import TorchLinear, dequantize


class FusedLinear4bit(Linear4bit):  # type: ignore[misc]
    """PEFT's layer with another forward pass; the weights, and what is saved of them, are PEFT's."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return W x + scaling * B A dropout(x)."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant or args or kwargs:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        (name,) = active
        dropout = self.lora_dropout[name]
        low_input = x if isinstance(dropout, torch.nn.Identity) or not self.training else dropout(x)
        a_RI, b_OR, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        if not torch.is_grad_enabled():
            return _output(x, _low(low_input, a_RI), b_OR, scaling, self.base_layer)
        promise, low_NR = _Kept.apply(x, low_input, a_RI, b_OR, scaling, self.base_layer)  # type: ignore[no-untyped-call]
        return _Output.apply(promise, x, low_NR, b_OR.detach(), scaling, self.base_layer)  # type: ignore[no-any-return, no-untyped-call]


def _low(low_input: torch.Tensor, a_RI: torch.Tensor) -> torch.Tensor:
    """Return the image of the input that LoRA makes, N x R."""
    return low_input.reshape(-1, low_input.shape[-1]) @ a_RI.t().to(low_input.dtype)


def _output(x: torch.Tensor, low_NR: torch.Tensor, b_OR: torch.Tensor, scaling: float, base: bitsandbytes.nn.Linear4bit) -> torch.Tensor:
    y: torch.Tensor = base(x)
    y.view(-1, y.shape[-1]).addmm_(low_NR, b_OR.t().to(x.dtype), alpha=scaling)
    return y


class _Kept(torch.autograd.Function):
    """What the gradient needs, of which the output does not: hence a promise of it, N x O without memory, and the gradient of that."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, low_input: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float,
        base: bitsandbytes.nn.Linear4bit,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        low_NR = _low(low_input, a_RI)
        ctx.save_for_backward(low_input.reshape(-1, x.shape[-1]), low_NR, a_RI, b_OR)
        ctx.scaling, ctx.base, ctx.one_input, ctx.shape = scaling, base, low_input is x, x.shape
        ctx.mark_non_differentiable(low_NR)
        ctx.set_materialize_grads(False)  # else zeros for the image, which has no gradient
        return x.new_zeros(()).expand(*x.shape[:-1], base.out_features), low_NR

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        low_input_NI, low_NR, a_RI, b_OR = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_b_OR = (grad_NO.t() @ low_NR).to(b_OR.dtype).mul_(ctx.scaling)
        grad_low_NR = (grad_NO @ b_OR.to(grad.dtype)).mul_(ctx.scaling)
        grad_a_RI = (grad_low_NR.t() @ low_input_NI).to(a_RI.dtype)
        grad_x_NI = grad_low_input = None
        if ctx.needs_input_grad[0]:
            grad_x_NI = grad_NO @ _matrix(ctx.base, grad.dtype)
        if ctx.one_input and grad_x_NI is not None:
            grad_x_NI.addmm_(grad_low_NR, a_RI.to(grad.dtype))
        elif ctx.needs_input_grad[1]:
            grad_low_input = (grad_low_NR @ a_RI.to(grad.dtype)).view(ctx.shape)
        return None if grad_x_NI is None else grad_x_NI.view(ctx.shape), grad_low_input, grad_a_RI, grad_b_OR, None, None


class _Output(torch.autograd.Function):
    """The product in the place of its promise, whose gradient is its own."""

    @staticmethod
    def forward(
        ctx: Any, promise: torch.Tensor, x: torch.Tensor, low_NR: torch.Tensor, b_OR: torch.Tensor, scaling: float,
        base: bitsandbytes.nn.Linear4bit,
    ) -> torch.Tensor:  # fmt: skip
        return _output(x, low_NR, b_OR, scaling, base)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad, None, None, None, None, None


def _matrix(layer: bitsandbytes.nn.Linear4bit, dtype: torch.dtype) -> torch.Tensor:
    """Return the frozen matrix, O x I, by the kernel that the layer computes with."""
    if isinstance(layer, TorchLinear):
        return dequantize(layer.weight, dtype)
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)  # type: ignore[no-any-return]


def fuse(model: torch.nn.Module) -> None:
    """Let every LoRA layer on an NF4 matrix compute as one operation."""
    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = FusedLinear4bit
