"""The objective of ReFT (arXiv 2401.08967, section 3): a warm-up by supervised fine-tuning, then PPO on sampled answers.

Each step of PPO samples one answer for each of its questions and makes several updates on them. The per-token reward is the
KL penalty against the warm-up model, and at the last token the reward on the final answer. Advantages are whitened over the
step and the loss is the mean over answers of their mean over tokens, as in the paper's released code.

Shapes: B answers of a step, T tokens of one answer, N tokens of all of them, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch

from edge_agent.job import NlftOptions, ReftOptions
from edge_agent.training.checkpoint import Parameters, Tensors
from edge_agent.training.contexts import Sample
from edge_agent.training.generate import generate
from edge_agent.training.head import answer_logp
from edge_agent.training.loop import Training, check_finite, learning_rate, order, starts_epoch, total_updates, trained
from edge_agent.training.methods.method import Weights
from edge_agent.training.methods.reft import Reft, reward
from edge_agent.training.packing import Pack, answer_hidden, pack
from edge_agent.training.reporter import OnProgress
from edge_agent.training.weighted import Weighted
from profiles.recorder import StageName

Count = Callable[[int, StageName], None]
"""Hears of tokens through the model, and what they were for."""


@dataclass(frozen=True)
class Answers:
    """The sampled answers of a step, end-of-sequence included where they end; those with the longest rows first."""

    question_B: torch.Tensor
    """Index of the sample whose question is answered."""
    length_B: torch.Tensor
    ids_N: torch.Tensor

    @property
    def shares(self) -> torch.Tensor:
        """Weight of each token in a mean over answers of their means over tokens, N."""
        return (1 / (len(self.length_B) * self.length_B)).repeat_interleave(self.length_B)


@dataclass(frozen=True)
class Rollout(Answers):
    """Answers as the policy that wrote them saw them."""

    reward_B: torch.Tensor
    """On the final answer."""
    kl_B: torch.Tensor
    """Sum over the tokens of their log-ratio to the warm-up model."""
    logp_N: torch.Tensor
    value_N: torch.Tensor
    advantage_N: torch.Tensor
    return_N: torch.Tensor


def advantages(reward_T: torch.Tensor, value_T: torch.Tensor, gamma: float, gae_lambda: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (generalized advantage estimates, lambda-returns) of one answer (arXiv 1506.02438); after its end the value is 0."""
    advantage, following, found = 0.0, 0.0, []
    for step_reward, value in zip(reversed(reward_T.tolist()), reversed(value_T.tolist()), strict=True):
        advantage = step_reward + gamma * following - value + gamma * gae_lambda * advantage
        following = value
        found.append(advantage)
    advantage_T = torch.tensor(found[::-1])
    return advantage_T, advantage_T + value_T


def whiten(values_N: torch.Tensor) -> torch.Tensor:
    """Return values shifted and scaled to mean 0 and variance 1."""
    return (values_N - values_N.mean()) * (values_N.var(correction=0) + 1e-8).rsqrt()


def estimate(
    answers: Answers, reward_B: torch.Tensor, kl_N: torch.Tensor, logp_N: torch.Tensor, value_N: torch.Tensor, o: ReftOptions
) -> Rollout:
    """Return what the answers are worth: the KL penalty on every token and, on the last one, the reward on the final answer."""
    lengths = answers.length_B.tolist()
    reward_N = -o.kl_coefficient * kl_N
    reward_N[answers.length_B.cumsum(0) - 1] += reward_B
    parts = [advantages(r, v, o.gamma, o.gae_lambda) for r, v in zip(reward_N.split(lengths), value_N.split(lengths), strict=True)]
    advantage_N, return_N = (torch.cat(x) for x in zip(*parts, strict=True))
    kl_B = torch.stack([kl_T.sum() for kl_T in kl_N.split(lengths)])
    return Rollout(
        **vars(answers), reward_B=reward_B, kl_B=kl_B, logp_N=logp_N, value_N=value_N, advantage_N=whiten(advantage_N), return_N=return_N
    )


def ppo_loss(logp_N: torch.Tensor, value_N: torch.Tensor, old: Rollout, tokens: slice, o: ReftOptions) -> torch.Tensor:
    """Return the loss of each token of a part of a rollout: clipped surrogate plus weighted clipped value loss (equation 2)."""
    device = logp_N.device
    old_logp_N, old_value_N, advantage_N, return_N = (
        x[tokens].to(device) for x in (old.logp_N, old.value_N, old.advantage_N, old.return_N)
    )
    ratio_N = (logp_N - old_logp_N).exp()
    policy_N = -torch.min(ratio_N * advantage_N, ratio_N.clamp(1 - o.clip_range, 1 + o.clip_range) * advantage_N)
    near_N = old_value_N + (value_N - old_value_N).clamp(-o.clip_range, o.clip_range)
    value_loss_N = 0.5 * torch.max((value_N - return_N) ** 2, (near_N - return_N) ** 2)
    return policy_N + o.value_coefficient * value_loss_N


class Reinforced:
    """Warm-up updates, then PPO's; `restart` is the first of those."""

    def __init__(self, model: Any, samples: list[Sample], weights: list[Weights], training: Training) -> None:
        if not isinstance(training.method, Reft) or training.verifier is None:
            raise TypeError("PPO needs the options of ReFT and a verifier to reward outputs by")
        o, self._verifier = training.method.options, training.verifier
        self._options = o
        self._model, self._samples, self._training = model, samples, training
        schedule = training.schedule
        warm_up = msgspec.structs.replace(schedule, epochs=o.warmup_epochs, updates=None)
        self._warm_up = Weighted(model, samples, weights, replace(training, schedule=warm_up))
        self.restart = self._warm_up.updates
        steps = -(-schedule.updates // o.inner_updates) if schedule.updates else total_updates(schedule, len(samples))
        self._steps = order(len(samples), msgspec.structs.replace(schedule, updates=steps), training.seed)
        self.updates = self.restart + (schedule.updates or steps * o.inner_updates)
        self._adapter = trained(model)
        self._value = torch.nn.Linear(model.get_output_embeddings().in_features, 1, device=model.device)
        torch.nn.init.zeros_(self._value.weight)
        torch.nn.init.zeros_(self._value.bias)
        self.parameters: Parameters = {**self._adapter, **{f"value.{name}": p for name, p in self._value.named_parameters()}}
        self._reference: Tensors = {}
        self.rollout: Rollout | None = None

    def learning_rate(self, update: int) -> float:
        if update < self.restart:
            return self._warm_up.learning_rate(update)
        schedule = self._training.schedule
        return self._options.learning_rate_ratio * learning_rate(update - self.restart, self.updates - self.restart, schedule)

    def ends_epoch(self, update: int) -> bool:
        """Whether a pass of PPO over the questions ends; the warm-up is not measured."""
        step, rest = divmod(update + 1 - self.restart, self._options.inner_updates)
        passed = step > 0 and rest == 0 and starts_epoch(step, len(self._samples), self._training.schedule.batch)
        return passed or update + 1 == self.updates

    def state(self) -> Tensors:
        found = {f"reference/{name}": tensor for name, tensor in self._reference.items()}
        return found | ({f"rollout/{name}": tensor for name, tensor in vars(self.rollout).items()} if self.rollout else {})

    def restore(self, state: Tensors) -> None:
        device = self._model.device
        self._reference = {name: state[f"reference/{name}"].to(device) for name in self._adapter}
        self.rollout = Rollout(**{name.removeprefix("rollout/"): t for name, t in state.items() if name.startswith("rollout/")})

    def change(self, options: NlftOptions) -> None:
        raise TypeError("nothing of ReFT changes while it runs")  # such a request is refused before (edge_agent/new_options.py)

    def backward(self, update: int, progress: OnProgress) -> tuple[float, int]:
        """Add up the gradients of one update; the first of a step samples its answers."""
        if update < self.restart:
            return self._warm_up.backward(update, progress)
        for module in self._model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # the ratio compares policies, not dropouts; the paper's code does the same
        step, inner = divmod(update - self.restart, self._options.inner_updates)
        if inner == 0 or self.rollout is None:
            reference = self._reference or {name: p.detach().clone() for name, p in self._adapter.items()}
            rollout = self._sample(step, update, reference, progress)
            self._reference, self.rollout = reference, rollout
        return self._backward(self.rollout, update)

    def _backward(self, rollout: Rollout, update: int) -> tuple[float, int]:
        self._model.train()
        plan, loss, tokens = self._training.plan, 0.0, 0
        for packed, where in self._packs(rollout, plan.micro_batch):
            hidden_ND = answer_hidden(self._model, packed, plan.offload_checkpoints)
            logp_N = answer_logp(self._model, hidden_ND, packed.target_ids_N, plan.head_chunk)
            loss_N = ppo_loss(logp_N, self._value(hidden_ND.float())[:, 0], rollout, where, self._options)
            part = (loss_N * rollout.shares[where].to(loss_N.device)).sum()
            part.backward()
            loss += part.item()
            tokens += packed.tokens
        check_finite(loss, update, [self._samples[i] for i in rollout.question_B.tolist()])
        return loss, tokens

    def _sample(self, step: int, update: int, reference: Tensors, progress: OnProgress) -> Rollout:
        """Sample an answer to each question of a step, and say what its tokens are worth."""

        def count(tokens: int, doing: StageName) -> None:
            progress(update, self.updates, tokens, None, doing)

        answers, reward_B = self._draw(step, count)
        logp_N, value_N = self._look(answers, count)
        with self._exchanged(reference):
            kl_N = logp_N - self._look(answers, count)[0]
        return estimate(answers, reward_B, kl_N, logp_N, value_N, self._options)

    def _draw(self, step: int, count: Count) -> tuple[Answers, torch.Tensor]:
        """Return the sampled answers and their rewards."""
        t, batch = self._training, self._steps[step]
        prompts = [self._samples[i].prompts["base"] for i in batch]
        new = generate(
            self._model, t.tokenizer, prompts, max_new_tokens=[min(t.max_new_tokens, t.context_tokens - len(ids)) for ids in prompts],
            batch=t.plan.generate_batch, progress=lambda done, total, tokens: count(tokens, "sample"), temperature=1.0,
            seed=hash((t.seed, step)), keep_end=True,
        )  # fmt: skip
        drawn = sorted(
            zip(batch, (row.ids for row in new), strict=True), key=lambda d: -len(self._samples[d[0]].prompts["base"]) - len(d[1])
        )
        texts = t.tokenizer.batch_decode([ids for _, ids in drawn], skip_special_tokens=True)
        standard = [self._samples[i].target.text for i, _ in drawn]
        rewards = [reward(text, answer, self._verifier, self._options.partial_reward) for text, answer in zip(texts, standard, strict=True)]
        answers = Answers(
            torch.tensor([i for i, _ in drawn]),
            torch.tensor([len(ids) for _, ids in drawn]),
            torch.tensor([token for _, ids in drawn for token in ids]),
        )
        return answers, torch.tensor(rewards)

    @torch.no_grad()
    def _look(self, answers: Answers, count: Count) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (log-probabilities, values) of the answers' tokens with the adapter as it is, on the CPU."""
        self._model.eval()
        found = []
        for packed, _ in self._packs(answers, 2 * self._training.plan.micro_batch):
            hidden_ND = answer_hidden(self._model, packed)
            logp_N = answer_logp(self._model, hidden_ND, packed.target_ids_N, self._training.plan.head_chunk)
            found.append((logp_N.cpu(), self._value(hidden_ND.float())[:, 0].cpu()))
            count(packed.tokens, "score")
        logp, value = zip(*found, strict=True)
        return torch.cat(logp), torch.cat(value)

    def _packs(self, answers: Answers, rows: int) -> Iterator[tuple[Pack, slice]]:
        """Yield the answers in packs of some rows, each with the place of its tokens in N."""
        prompts = [self._samples[i].prompts["base"] for i in answers.question_B.tolist()]
        pairs = list(zip(prompts, [ids.tolist() for ids in answers.ids_N.split(answers.length_B.tolist())], strict=True))
        place = 0
        for start in range(0, len(pairs), rows):
            packed = pack(self._model, pairs[start : start + rows], self._training.tokenizer.pad_token_id)
            yield packed, slice(place, place + len(packed.target_ids_N))
            place += len(packed.target_ids_N)

    @contextmanager
    def _exchanged(self, reference: Tensors) -> Iterator[None]:
        """Put the warm-up model's adapter in the place of the policy's for a while, without a copy."""
        self._exchange(reference)
        try:
            yield
        finally:
            self._exchange(reference)

    def _exchange(self, reference: Tensors) -> None:
        for name, parameter in self._adapter.items():
            parameter.data, reference[name] = reference[name], parameter.data
