"""AdamW with its moments in 32 or in 8 bits, and the change from one to the other in the middle of a run.

8 bits are those of bitsandbytes (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization): one byte a moment, scaled by blocks
of 256. Small tensors keep 32 bits, there as here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise
from bitsandbytes.optim import AdamW8bit

from edge_agent.job import Schedule

BLOCK = 256
MOMENTS = (("exp_avg", "1"), ("exp_avg_sq", "2"))
"""PyTorch's name of a moment, and its number in bitsandbytes' names."""


def make_optimizer(parameters: Iterable[torch.nn.Parameter], schedule: Schedule, eight_bit: bool) -> torch.optim.Optimizer:
    """Return AdamW on the parameters, as the schedule says."""
    kind: Any = AdamW8bit if eight_bit else torch.optim.AdamW
    made: torch.optim.Optimizer = kind(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    return made


def saved_state(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Return what the optimizer remembers of a parameter, as tensors."""
    return {name: torch.as_tensor(value) for name, value in optimizer.state[parameter].items()}


def restore_state(optimizer: Any, parameter: torch.nn.Parameter, saved: dict[str, torch.Tensor]) -> None:
    """Give back what `saved_state` returned, in the bits of this optimizer; in its own bits nothing is rounded."""
    state: dict[str, Any] = {name: value.to(parameter.device) for name, value in saved.items()}
    if isinstance(optimizer, AdamW8bit):
        state = state if "state1" in state else _narrowed(optimizer, parameter, state)
        optimizer.state[parameter] = state | {"step": int(saved["step"])}
    else:
        state = state if "exp_avg" in state else _widened(state)
        # The step counter stays on the host, as AdamW keeps it.
        optimizer.state[parameter] = state | {"step": saved["step"].float()}


def _narrowed(optimizer: Any, parameter: torch.nn.Parameter, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return moments of 32 bits in 8."""
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    made: dict[str, Any] = optimizer.state[parameter]
    for name, number in MOMENTS:
        if made[f"state{number}"].dtype == torch.uint8:
            made[f"state{number}"], scales = quantize_blockwise(state[name], code=made[f"qmap{number}"], blocksize=BLOCK)
            made[f"absmax{number}"] = scales.absmax
        else:
            made[f"state{number}"] = state[name]
    return made


def _widened(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return moments of 8 bits in 32."""
    made = {}
    for name, number in MOMENTS:
        moment = state[f"state{number}"]
        if moment.dtype == torch.uint8:
            moment = dequantize_blockwise(moment, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=BLOCK)
        made[name] = moment
    return made
