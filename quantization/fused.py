"""A frozen NF4 matrix and its LoRA matrices as one operation, with its gradient.

PEFT's own layer copies the output, then scales and adds the low-rank part in tensors of the output's size, and keeps a copy of the input
in 32 bits. Here the low-rank part is added in place, and of the activations only the input and its low-rank image are kept.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora.bnb import Linear4bit


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
        weights = self.lora_A[name].weight, self.lora_B[name].weight
        return _FusedLinear.apply(x, low_input, *weights, self.scaling[name], self.base_layer)  # type: ignore[no-any-return, no-untyped-call]


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, low_input: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float,
        base: bitsandbytes.nn.Linear4bit,
    ) -> torch.Tensor:  # fmt: skip
        y: torch.Tensor = base(x)
        y_NO, low_input_NI = y.view(-1, y.shape[-1]), low_input.reshape(-1, x.shape[-1])
        low_NR = low_input_NI @ a_RI.t().to(x.dtype)
        y_NO.addmm_(low_NR, b_OR.t().to(x.dtype), alpha=scaling)
        ctx.save_for_backward(low_input_NI, low_NR, a_RI, b_OR)
        ctx.scaling, ctx.base, ctx.one_input, ctx.shape = scaling, base, low_input is x, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low_input_NI, low_NR, a_RI, b_OR = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_b_OR = (grad_NO.t() @ low_NR).to(b_OR.dtype).mul_(ctx.scaling)
        grad_low_NR = (grad_NO @ b_OR.to(grad.dtype)).mul_(ctx.scaling)
        grad_a_RI = (grad_low_NR.t() @ low_input_NI).to(a_RI.dtype)
        grad_x_NI = grad_low_input = None
        if ctx.needs_input_grad[0]:
            weight_OI = dequantize_4bit(ctx.base.weight.data, ctx.base.weight.quant_state).to(grad.dtype)
            grad_x_NI = grad_NO @ weight_OI
            del weight_OI
        if ctx.one_input and grad_x_NI is not None:
            grad_x_NI.addmm_(grad_low_NR, a_RI.to(grad.dtype))
        elif ctx.needs_input_grad[1]:
            grad_low_input = (grad_low_NR @ a_RI.to(grad.dtype)).view(ctx.shape)
        return None if grad_x_NI is None else grad_x_NI.view(ctx.shape), grad_low_input, grad_a_RI, grad_b_OR, None, None


def fuse(model: torch.nn.Module) -> None:
    """Let every LoRA layer on an NF4 matrix compute as one operation."""
    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = FusedLinear4bit
