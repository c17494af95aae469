"""The optimizer loop: what it minimises is an objective; it keeps the schedule, the checkpoints, the exact resume and the early stop.

Everything in it is a function of the job and the number of the update: the samples of update u, its learning rate and its
dropout are the same whether or not the run was interrupted. Dropout is drawn for every micro-batch, so it is another one where a run goes
on with micro-batches of another size.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import torch
from msgspec.structs import replace

from edge_agent.dataset import Verify
from edge_agent.errors import NonFiniteLoss, Stopped, TimedOut
from edge_agent.job import NlftOptions, Schedule
from edge_agent.new_options import NewOptions
from edge_agent.report import Change
from edge_agent.training.checkpoint import Parameters, Progress, Tensors, load_checkpoint, save_checkpoint, under
from edge_agent.training.contexts import Sample
from edge_agent.training.methods.method import Method, Scores
from edge_agent.training.optimizer import make_optimizer
from edge_agent.training.reporter import Crowded, OnProgress
from edge_agent.training.scoring import score
from quantization.adapter import checkpoint_activations
from quantization.plan import Plan


@dataclass(frozen=True)
class Training:
    """What a training run is made of; `key` identifies it for its checkpoint."""

    key: str
    schedule: Schedule
    seed: int
    plan: Plan
    tokenizer: Any
    directory: Path
    method: Method
    verifier: Verify | None = None
    max_new_tokens: int = 0
    context_tokens: int = 0
    """Verdict on the outputs that are sampled while training, the longest of them, and the model's context that they have to fit."""
    development: Sequence[Sample] = ()
    """Never trained on; their loss decides which adapter is kept, where the schedule has patience."""
    rescored: Callable[[Sequence[tuple[int, int, Scores]]], None] | None = None
    """Hears what is scored again: the epoch, counted from 1, the number of the sample, and its scores, each context once. A base context
    that is all NaN comes later, from the training pass."""
    scores: Sequence[Scores] = ()
    """Of the samples before training, where other options may make other weights of them."""
    newer: Callable[[int], NewOptions | None] = lambda _: None
    """Asked before every update for options with a higher number than those that were taken last."""
    look: Callable[[], None] = lambda: None
    """Called before every update: somebody may want to see what is known by then."""
    taken: Callable[[Change], None] = lambda _: None
    """Hears of options that training goes on with, when they are in its checkpoint."""


class Objective(Protocol):
    """What the loop minimises, update by update."""

    updates: int
    restart: int
    """The update before which the optimizer forgets its moments."""
    parameters: Parameters
    """What the optimizer changes, by name."""

    def learning_rate(self, update: int) -> float: ...

    def backward(self, update: int, progress: OnProgress) -> tuple[float, int]:
        """Add up the gradients of one update; return (loss, tokens computed).

        What leaves it by an exception has changed nothing that `state` returns.
        """

    def ends_epoch(self, update: int) -> bool:
        """Whether the development loss is due after an update."""

    def state(self) -> Tensors:
        """Return what `backward` depends on beside the parameters and the number of the update."""

    def restore(self, state: Tensors) -> None:
        """Take back what `state` returned."""

    def change(self, options: NlftOptions) -> None:
        """Go on with other options of its method, from the next update on."""


def optimize(model: Any, objective: Objective, training: Training, progress: OnProgress) -> tuple[Progress, bool]:
    """Train the adapter in place; return where it ended, and whether it went on from a checkpoint.

    With patience it stops early, and the adapter is in the end that of the epoch with the lowest development loss.
    New options are in a checkpoint before the first update with them, so a run that goes on takes them at the same update.
    Raises NonFiniteLoss, DiskFull, and TimedOut, Stopped or Crowded with a checkpoint written.
    """
    schedule, parameters = training.schedule, objective.parameters
    optimizer = make_optimizer(parameters.values(), schedule, training.plan.adam_8bit)
    state, best = _go_on(objective, optimizer, training)
    if training.plan.checkpointing:
        checkpoint_activations(model)
    resumed, saved_at = state.updates > 0, time.monotonic()

    def save() -> None:
        keep = _named("best/", best) | _named("objective/", objective.state())
        save_checkpoint(training.directory, parameters, optimizer, keep, state)

    try:
        while not _finished(state, objective, schedule):
            training.look()
            if (new := training.newer(state.change)) is not None:
                state = replace(state, changes=(*state.changes, Change(new.number, state.updates, new.method)))
                objective.change(new.method)
                save()
                saved_at = time.monotonic()
                training.taken(state.changes[-1])
            loss, tokens = _update(state.updates, objective, optimizer, schedule, progress)
            state = replace(state, updates=state.updates + 1, losses=(*state.losses, loss))
            if schedule.patience and objective.ends_epoch(state.updates - 1):
                state, scored = _measure_development(model, training, state)
                tokens += scored
                if state.kept == state.updates:
                    best = {name: p.detach().cpu().clone() for name, p in parameters.items()}
            if time.monotonic() - saved_at >= schedule.checkpoint_s or _finished(state, objective, schedule):
                save()
                saved_at = time.monotonic()
            progress(state.updates, objective.updates, tokens, loss, None)
        training.look()
    except (Crowded, Stopped, TimedOut):  # raised by `progress`, between updates or before one has changed the parameters
        save()
        raise
    for name, tensor in best.items():
        parameters[name].data.copy_(tensor)
    model.eval()
    return state, resumed


def _go_on(objective: Objective, optimizer: torch.optim.Optimizer, training: Training) -> tuple[Progress, Tensors]:
    """Take up the checkpoint, if there is one; return where it stands, and the best weights so far."""
    state, kept = load_checkpoint(training.directory, objective.parameters, optimizer, training.key)
    if needed := under("objective/", kept):
        objective.restore(needed)
    if state.changes:
        objective.change(state.changes[-1].method)
        training.taken(state.changes[-1])
    return state, under("best/", kept)


def _finished(state: Progress, objective: Objective, schedule: Schedule) -> bool:
    return state.updates == objective.updates or (schedule.patience is not None and state.waited >= schedule.patience)


def _update(
    update: int, objective: Objective, optimizer: torch.optim.Optimizer, schedule: Schedule, progress: OnProgress
) -> tuple[float, int]:
    """Make one update; return (loss, tokens computed)."""
    if update == objective.restart:
        optimizer.state.clear()
    loss, tokens = objective.backward(update, progress)
    torch.nn.utils.clip_grad_norm_(objective.parameters.values(), schedule.max_grad_norm)
    optimizer.param_groups[0]["lr"] = objective.learning_rate(update)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, tokens


def _measure_development(model: Any, training: Training, state: Progress) -> tuple[Progress, int]:
    """Return the progress with one more development loss, and the tokens that it took."""
    plan, counted = training.plan, []
    found = score(
        model, [*training.development], 2 * plan.micro_batch, plan.head_chunk, training.tokenizer.pad_token_id,
        lambda done, total, tokens: counted.append(tokens),
    )  # fmt: skip
    loss = -torch.cat([scores.base_logp_T for _, scores in sorted(found, key=itemgetter(0))]).mean().item()
    kept = state.updates if loss < min(state.development, default=math.inf) else state.kept
    return replace(state, development=(*state.development, loss), kept=kept), sum(counted)


def _named(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def trained(model: Any) -> Parameters:
    """Return the adapter's parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def total_updates(schedule: Schedule, samples: int) -> int:
    return schedule.updates or -(-schedule.epochs * samples // schedule.batch)


def order(samples: int, schedule: Schedule, seed: int) -> list[list[int]]:
    """Return the samples of each update: every epoch is a new permutation, and updates run on across epochs."""
    stream: list[int] = []
    updates, epoch = total_updates(schedule, samples), 0
    while len(stream) < updates * schedule.batch and (schedule.updates or epoch < schedule.epochs):
        permutation = list(range(samples))
        random.Random(f"order/{seed}/{epoch}").shuffle(permutation)
        stream += permutation
        epoch += 1
    return [stream[u * schedule.batch : (u + 1) * schedule.batch] for u in range(updates)]


def learning_rate(update: int, updates: int, schedule: Schedule) -> float:
    """Linear warm-up to the rate of the schedule, then cosine to zero."""
    warm = max(1, round(schedule.warmup * updates))
    if update < warm:
        return schedule.learning_rate * (update + 1) / warm
    return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * (update - warm) / max(1, updates - warm)))


def starts_epoch(update: int, samples: int, batch: int) -> bool:
    """Whether an update is the first that begins in a new epoch; the very first update is not.

    Where the batch does not divide the samples, the update before it may have taken the first samples of that epoch.
    """
    return (update * batch) // samples > ((update - 1) * batch) // samples if update else False


def check_finite(loss: float, update: int, samples: list[Sample]) -> None:
    if not math.isfinite(loss):
        raise NonFiniteLoss(update + 1, ", ".join(str(s.target.record.id) for s in samples))
