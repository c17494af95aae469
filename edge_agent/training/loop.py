"""The optimizer loop: weighted losses in micro-batches, checkpoints, exact resume.

Everything in it is a function of the job and the number of the update: the samples of update u, its learning rate and its
dropout are the same whether or not the run was interrupted.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edge_agent.errors import NonFiniteLoss, Stopped, TimedOut
from edge_agent.job import Schedule
from edge_agent.training.checkpoint import Progress, load_checkpoint, save_checkpoint, trained
from edge_agent.training.contexts import Sample
from edge_agent.training.methods.method import Weights
from edge_agent.training.packing import answer_hidden, pack, weighted_loss
from quantization.plan import Plan

OnUpdate = Callable[[int, int, int, float], None]


@dataclass(frozen=True)
class Training:
    """What a training run is made of; `key` identifies it for its checkpoint."""

    key: str
    schedule: Schedule
    seed: int
    plan: Plan
    pad_id: int
    directory: Path
    rescore: Callable[[], list[Weights]] | None
    """Weighs the samples again with the adapter as it is, at the start of each epoch but the first."""


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


def train(model: Any, samples: list[Sample], weights: list[Weights], training: Training, progress: OnUpdate) -> tuple[Progress, bool]:
    """Train the adapter in place; return where it ended, and whether it went on from a checkpoint.

    `progress` hears (update, updates, tokens, loss). The loss of an update is the weighted sum over its tokens divided by their
    number, whatever the micro-batches. Raises NonFiniteLoss, DiskFull, and TimedOut or Stopped with a
    checkpoint written.
    """
    schedule, plan = training.schedule, training.plan
    batches = order(len(samples), schedule, training.seed)
    parameters = [p for _, p in trained(model)]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    state, weights = load_checkpoint(training.directory, model, optimizer, weights, training.key)
    if plan.checkpointing:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    resumed, saved_at = state.updates > 0, time.monotonic()
    try:
        for update in range(state.updates, len(batches)):
            if training.rescore and update and _starts_epoch(update, len(samples), schedule.batch):
                weights = training.rescore()
            loss, tokens = _accumulate(model, samples, weights, batches[update], training, update)
            torch.nn.utils.clip_grad_norm_(parameters, schedule.max_grad_norm)
            optimizer.param_groups[0]["lr"] = learning_rate(update, len(batches), schedule)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state = Progress(training.key, update + 1, state.tokens + tokens, (*state.losses, loss))
            if time.monotonic() - saved_at >= schedule.checkpoint_s or update + 1 == len(batches):
                save_checkpoint(training.directory, model, optimizer, weights, state)
                saved_at = time.monotonic()
            progress(update + 1, len(batches), tokens, loss)
    except (Stopped, TimedOut):  # raised between updates, by `progress` or while scores are renewed
        save_checkpoint(training.directory, model, optimizer, weights, state)
        raise
    model.eval()
    return state, resumed


def _starts_epoch(update: int, samples: int, batch: int) -> bool:
    return (update * batch) // samples > ((update - 1) * batch) // samples


def _accumulate(
    model: Any, samples: list[Sample], weights: list[Weights], batch: list[int], training: Training, update: int
) -> tuple[float, int]:
    """Add up the gradients of one update; return (loss, tokens computed). The longest samples come first."""
    model.train()
    longest_first = sorted(batch, key=lambda i: -samples[i].longest)
    answer_tokens = sum(len(samples[i].answer) for i in batch)
    loss, tokens, size = 0.0, 0, training.plan.micro_batch
    for start in range(0, len(batch), size):
        group = longest_first[start : start + size]
        packed = pack([(samples[i].prompts["base"], samples[i].answer) for i in group], training.pad_id, model.device)
        torch.manual_seed(hash((training.seed, update, start)) & 0x7FFFFFFF)  # dropout; integers hash the same in every process
        likelihood_N = torch.cat([weights[i].likelihood_T for i in group]).to(model.device, torch.float32)
        unlikelihood_N = torch.cat([weights[i].unlikelihood_T for i in group]).to(model.device, torch.float32)
        hidden_ND = answer_hidden(model, packed)
        part = weighted_loss(model, hidden_ND, packed.target_ids_N, likelihood_N, unlikelihood_N, training.plan.head_chunk) / answer_tokens
        part.backward()
        loss += part.item()
        tokens += packed.tokens
    if not math.isfinite(loss):
        raise NonFiniteLoss(update + 1, ", ".join(str(samples[i].target.record.id) for i in batch))
    return loss, tokens
