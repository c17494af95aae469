"""The rungs of the ladder: those that only reorder the work train the same adapter; 8-bit Adam is small, exact to resume, and close."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tiny_training import Killed, Tiny, adapter, judged_records, kill_after

from edge_agent.job import Lora, NlftOptions, Schedule
from edge_agent.training.checkpoint import Progress, load_checkpoint
from edge_agent.training.loop import trained
from edge_agent.training.methods.nlft import Nlft
from edge_agent.training.optimizer import make_optimizer

SCHEDULE = Schedule(batch=8, updates=6, learning_rate=5e-3, checkpoint_s=0)
LORA = Lora(rank=32)
"""Large enough for moments in 8 bits: bitsandbytes leaves tensors of less than 4,096 numbers in 32."""
REORDERED: dict[str, dict[str, Any]] = {
    "1: smaller micro-batch": {"micro_batch": 1},
    "2: smaller head chunks": {"head_chunk": 3},
    "3: activation checkpointing": {"checkpointing": True},
    "7: checkpoints on the host": {"checkpointing": True, "offload_checkpoints": True},
}


@pytest.fixture
def tiny(tiny_model: Path) -> Tiny:
    return Tiny(tiny_model)


def _run(
    tiny: Tiny, directory: Path, until: int | None = None, within: int | None = None, **settings: Any
) -> tuple[torch.Tensor, tuple[float, ...]]:
    """Train with settings of a plan; return the adapter as one vector, and the losses.

    It is killed after `until` updates, or when micro-batch `within` of the run begins its forward pass.
    """
    method = Nlft(NlftOptions(references="live"))
    samples = tiny.samples(method, judged_records(8))
    directory.mkdir(exist_ok=True)
    training = tiny.training(method, directory, SCHEDULE, micro_batch=8)
    training = replace(training, plan=msgspec.structs.replace(training.plan, **settings))
    with tiny.adapted(LORA) as model:
        if until is not None or within is not None:
            hook = model.get_decoder().register_forward_pre_hook(_kill_in(within))
            with pytest.raises(Killed):
                tiny.train(model, samples, training, kill_after(until))
            hook.remove()
            return torch.empty(0), ()
        begun = (directory / "checkpoint.safetensors").exists()
        state, resumed = tiny.train(model, samples, training)
        assert resumed == begun
        return torch.cat([t.flatten() for t in adapter(model).values()]), state.losses


def _kill_in(number: int | None) -> Any:
    """Return a hook of the decoder that kills the run in a training pass; those that score are not counted."""
    passes = count(1)

    def hook(decoder: torch.nn.Module, _: Any) -> None:
        if decoder.training and next(passes) == number:
            raise Killed

    return hook


@pytest.mark.parametrize("rung", REORDERED)
def test_a_rung_that_reorders_the_work_trains_the_same_adapter(rung: str, tiny: Tiny, tmp_path: Path) -> None:
    """Losses and adapter after several updates to 1e-3, as with all the memory in the world.

    On a processor rung 7 moves nothing, as everything is on the host: it shows only that what takes part in it loses no gradient.
    """
    wanted, losses = _run(tiny, tmp_path / "asked")
    found, found_losses = _run(tiny, tmp_path / "rung", **REORDERED[rung])
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()
    assert found_losses == pytest.approx(losses, rel=1e-3)


def test_moments_in_8_bits_train_nearly_the_same(tiny: Tiny, tmp_path: Path) -> None:
    """They take about a quarter of the bytes; the loss falls as it does with 32 bits, to a few percent of its fall."""
    _, exact = _run(tiny, tmp_path / "32")
    _, losses = _run(tiny, tmp_path / "8", adam_8bit=True)
    assert abs(losses[-1] - exact[-1]) <= 0.05 * (exact[0] - exact[-1])
    sizes = [_moments_bytes(tmp_path / name, tiny, eight_bit) for name, eight_bit in (("32", False), ("8", True))]
    assert sizes[1] < 0.3 * sizes[0]


def _moments_bytes(directory: Path, tiny: Tiny, eight_bit: bool) -> int:
    with tiny.adapted(LORA) as model:
        _, optimizer = _restored(model, directory, eight_bit)
        states: list[dict[str, Any]] = list(optimizer.state.values())
        # The maps from bytes to values are shared.
        return sum(v.nbytes for s in states for k, v in s.items() if isinstance(v, torch.Tensor) and not k.startswith("qmap"))


def _restored(model: Any, directory: Path, eight_bit: bool) -> tuple[Progress, torch.optim.Optimizer]:
    optimizer = make_optimizer(trained(model).values(), SCHEDULE, eight_bit)
    progress, _ = load_checkpoint(directory, trained(model), optimizer, "key")
    assert progress.updates > 0
    return progress, optimizer


@pytest.mark.slow
@pytest.mark.parametrize("end", [{"until": 3}, {"within": 3 * 3 + 2}])
def test_a_killed_run_with_moments_in_8_bits_ends_in_the_same_adapter(end: dict[str, int], tiny: Tiny, tmp_path: Path) -> None:
    """Bit for bit, killed after the third update, or in the second of the three micro-batches of the fourth one."""
    wanted, losses = _run(tiny, tmp_path / "whole", adam_8bit=True, micro_batch=3)
    _run(tiny, tmp_path / "killed", **end, adam_8bit=True, micro_batch=3)
    with tiny.adapted(LORA) as model:
        progress, _ = _restored(model, tmp_path / "killed", eight_bit=True)
    assert progress.updates == 3
    found, found_losses = _run(tiny, tmp_path / "killed", adam_8bit=True, micro_batch=3)
    assert torch.equal(found, wanted)
    assert found_losses == losses


@pytest.mark.slow
@pytest.mark.parametrize("eight_bit_first", [True, False])
def test_a_run_goes_on_with_moments_in_other_bits(eight_bit_first: bool, tiny: Tiny, tmp_path: Path) -> None:
    """A checkpoint of a higher rung is taken up by a lower one, and the other way round; the moments are those of before, rounded."""
    exact, _ = _run(tiny, tmp_path / "exact")
    _run(tiny, tmp_path / "changed", until=3, adam_8bit=eight_bit_first)
    found, losses = _run(tiny, tmp_path / "changed", adam_8bit=not eight_bit_first)
    assert len(losses) == SCHEDULE.updates
    fresh, _ = _run(tiny, tmp_path / "fresh", adam_8bit=True)
    assert (found - exact).norm() < 2 * (fresh - exact).norm()
