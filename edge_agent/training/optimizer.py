"""AdamW with its moments in 32 or in 8 bits, and the change from one to the other in the middle of a run.

8 bits are those of bitsandbytes (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization): one byte a moment, scaled by blocks
of 256. Small tensors keep 32 bits, there as here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise
from bitsandbytes.optim import AdamW8bit

from edge_agent.job import Schedule

BLOCK = 256
MOMENTS = (("exp_avg", "1", True), ("exp_avg_sq", "2", False))
"""PyTorch's name of a moment, its number in bitsandbytes' names, and whether it has a sign."""


def make_optimizer(parameters: Iterable[torch.nn.Parameter], schedule: Schedule, eight_bit: bool) -> torch.optim.Optimizer:
    """Return AdamW on the parameters, as the schedule says."""
    # On CUDA PyTorch would update all parameters at once, in temporaries of the size of all of them.
    kind: Any = AdamW8bit if eight_bit else partial(torch.optim.AdamW, foreach=False)
    made: torch.optim.Optimizer = kind(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    return made


def saved_state(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """Return what the optimizer remembers of a parameter, as tensors, without the maps from bytes to values, which are constants."""
    return {name: torch.as_tensor(value) for name, value in optimizer.state[parameter].items() if not name.startswith("qmap")}


def restore_state(optimizer: Any, parameter: torch.nn.Parameter, saved: dict[str, torch.Tensor]) -> None:
    """Give back what `saved_state` returned, in the bits of this optimizer; in its own bits nothing is rounded."""
    saved = {name: value if name == "step" else value.to(parameter.device) for name, value in saved.items()}
    if not isinstance(optimizer, AdamW8bit):
        moments = {name: _widened(saved, number, signed) if name not in saved else saved[name] for name, number, signed in MOMENTS}
        # The step counter stays on the host, as AdamW keeps it.
        optimizer.state[parameter] = moments | {"step": saved["step"].float()}
        return
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    state: dict[str, Any] = optimizer.state[parameter]
    state["step"] = int(saved["step"])
    for name, number, _ in MOMENTS:
        if name not in saved:
            state.update({key: saved[key] for key in (f"state{number}", f"absmax{number}") if key in saved})
        elif state[f"state{number}"].dtype == torch.uint8:
            state[f"state{number}"], scales = quantize_blockwise(saved[name], code=state[f"qmap{number}"], blocksize=BLOCK)
            state[f"absmax{number}"] = scales.absmax
        else:
            state[f"state{number}"] = saved[name]


def _widened(saved: dict[str, torch.Tensor], number: str, signed: bool) -> torch.Tensor:
    """Return a moment of bitsandbytes in 32 bits."""
    moment = saved[f"state{number}"]
    if moment.dtype != torch.uint8:
        return moment
    values = create_dynamic_map(signed=signed).to(moment.device)
    return dequantize_blockwise(moment, absmax=saved[f"absmax{number}"], code=values, blocksize=BLOCK)  # type: ignore[no-any-return]
