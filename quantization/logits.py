"""What architectures do with the logits of their output head before the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Finish:
    """A factor (Cohere, Granite), then a bound by a hyperbolic tangent (Gemma 2)."""

    factor: float = 1.0
    bound: float | None = None

    @classmethod
    def of(cls, config: Any) -> Finish:
        """Return what the configuration of a text model says."""
        factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(factor, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the finished logits, in 32 bits; the same tensor where nothing is done."""
        if self.factor != 1:
            logits = logits.float() * self.factor
        return logits if self.bound is None else (logits.float() / self.bound).tanh() * self.bound

    def to_head(self, grad: torch.Tensor, finished: torch.Tensor) -> torch.Tensor:
        """Return the gradient for the head's logits, of that for the finished ones."""
        if self.bound is not None:
            grad = grad * (1 - (finished / self.bound).square())
        return grad if self.factor == 1 else grad * self.factor
