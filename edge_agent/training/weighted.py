"""The objective of all methods that weigh the tokens of given answers: weighted likelihood and unlikelihood, in micro-batches."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch

from edge_agent.job import NlftOptions
from edge_agent.training.checkpoint import Tensors
from edge_agent.training.contexts import Sample
from edge_agent.training.head import answer_logp, weighted_loss
from edge_agent.training.loop import Training, check_finite, learning_rate, order, starts_epoch, trained
from edge_agent.training.methods import METHODS
from edge_agent.training.methods.method import CONTEXTS, Context, Method, Scores, Weights
from edge_agent.training.packing import Pack, answer_hidden, longest_first, pack
from edge_agent.training.reporter import OnProgress
from edge_agent.training.scoring import score_all, unscored, weigh


class Weighted:
    """The weighted sum over the tokens of an update divided by their number, whatever the micro-batches.

    `weights` are those before training; how often they are renewed is the method's `references`.
    """

    restart = 0

    def __init__(self, model: Any, samples: list[Sample], weights: list[Weights], training: Training) -> None:
        self._model, self._samples, self._weights, self._training = model, samples, weights, training
        self._method: Method = training.method
        self._scores = training.scores
        self._batches = order(len(samples), training.schedule, training.seed)
        self.updates = len(self._batches)
        self.parameters = trained(model)
        self._drops_out = drops_out(model)

    def learning_rate(self, update: int) -> float:
        return learning_rate(update, self.updates, self._training.schedule)

    def ends_epoch(self, update: int) -> bool:
        return update + 1 == self.updates or starts_epoch(update + 1, len(self._samples), self._training.schedule.batch)

    def state(self) -> Tensors:
        if self._method.references != "epoch":
            return {}  # scored again in any case
        weights = {
            "likelihood": torch.cat([w.likelihood_T for w in self._weights]),
            "unlikelihood": torch.cat([w.unlikelihood_T for w in self._weights]),
        }
        return weights | ({name: torch.cat([_logp(s, name) for s in self._scores]) for name in CONTEXTS} if self._scores else {})

    def restore(self, state: Tensors) -> None:
        lengths = [len(w.likelihood_T) for w in self._weights]
        pairs = zip(state["likelihood"].split(lengths), state["unlikelihood"].split(lengths), strict=True)
        self._weights = [Weights(likelihood_T, unlikelihood_T) for likelihood_T, unlikelihood_T in pairs]
        if self._scores and "base" in state:
            logps = zip(self._scores, *(state[name].split(lengths) for name in CONTEXTS), strict=True)
            # A context that was scored before training is scored in every epoch.
            self._scores = [
                Scores(base_T, None if s.standard_logp_T is None else standard_T, None if s.judge_logp_T is None else judge_T)
                for s, base_T, standard_T, judge_T in logps
            ]

    def change(self, options: NlftOptions) -> None:
        """Weigh by other options from now on, where weights are kept by the scores that made them."""
        self._method = METHODS[type(options)](options)
        if self._method.references != "live":
            self._weights = [self._method.weights(s.target, scores) for s, scores in zip(self._samples, self._scores, strict=True)]

    def backward(self, update: int, progress: OnProgress) -> tuple[float, int]:
        """Add up the gradients of one update. The longest samples come first."""
        of_update = self._batches[update]
        places = longest_first([self._row(self._samples[i]) for i in of_update])
        samples = [self._samples[of_update[place]] for place in places]
        left_out = self._left_to_pass(update)
        known = self._known(update, places, samples, left_out, progress)
        self._model.train()
        plan, seed = self._training.plan, self._training.seed
        answer_tokens = sum(len(s.answer) for s in samples)
        loss, tokens, size = 0.0, 0, plan.micro_batch
        of_pass: dict[int, Scores] = {}
        for start in range(0, len(samples), size):
            group = samples[start : start + size]
            packed = pack(self._model, [self._row(s) for s in group], self._training.tokenizer.pad_token_id)
            torch.manual_seed(hash((seed, update, start)) & 0x7FFFFFFF)  # dropout; integers hash the same in every process
            hidden_ND = answer_hidden(self._model, packed, plan.offload_checkpoints)
            likelihood_N, unlikelihood_N = self._on_device(self._weights_of(group, known[start : start + size], packed, hidden_ND))
            of_group = weighted_loss(self._model, hidden_ND, packed.target_ids_N, likelihood_N, unlikelihood_N, plan.head_chunk)
            part = of_group.total / answer_tokens
            part.backward()
            loss += part.item()
            if left_out and self._training.rescored:
                logp = zip(places[start : start + size], of_group.logp_N.cpu().split(packed.lengths), strict=True)
                of_pass |= {place: Scores(logp_T) for place, logp_T in logp if place in left_out}
            tokens += packed.tokens
        check_finite(loss, update, samples)
        self._tell(update, of_pass)
        return loss, tokens

    @staticmethod
    def _row(sample: Sample) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Prompt and answer that are trained on."""
        return sample.prompts[sample.target.prompt], sample.answer

    def _known(
        self, update: int, places: list[int], samples: list[Sample], left_out: set[int], progress: OnProgress
    ) -> list[Weights] | list[Scores]:
        """Return the weights of the samples at places of an update, or scores that the training pass has to complete first.

        They are renewed where the method asks for it, without the base context at the places that are left out.
        """
        method, plan, pad_id = self._method, self._training.plan, self._training.tokenizer.pad_token_id
        if method.references == "epoch" and starts_epoch(update, len(self._samples), self._training.schedule.batch):
            self._score_epoch(update, progress)
        if method.references == "pass":
            return [Scores(unscored(s)) for s in samples]
        if method.references != "live":
            return [self._weights[self._batches[update][place]] for place in places]

        def told(done: int, total: int, tokens: int, *_: object) -> None:
            progress(update, self.updates, tokens, None, "score")  # the rows of one update are no progress that a person could follow

        if not left_out:
            scores, weights = weigh(self._model, method, samples, plan, pad_id, told)
            self._tell(update, dict(zip(places, scores, strict=True)))
            return weights
        of_pass = {n for n, place in enumerate(places) if place in left_out}
        found = dict(score_all(self._model, method, samples, plan, pad_id, told, of_pass))
        self._tell(update, {place: found[n] for n, place in enumerate(places)})
        return [found[n] for n in range(len(samples))]

    def _score_epoch(self, update: int, progress: OnProgress) -> None:
        """Score all samples for the epoch that an update begins, and weigh them anew."""
        epoch = self._epoch(update, 0)
        of_epoch = takewhile(lambda later: self._epoch(later, 0) == epoch, range(update, self.updates))
        of_pass = {self._batches[later][place] for later in of_epoch for place in self._left_to_pass(later)}
        plan, pad_id = self._training.plan, self._training.tokenizer.pad_token_id
        scores, self._weights = weigh(self._model, self._method, self._samples, plan, pad_id, progress, of_pass)
        if self._scores:
            self._scores = scores
        if self._training.rescored:
            self._training.rescored([(epoch, i, s) for i, s in enumerate(scores)])

    def _left_to_pass(self, update: int) -> set[int]:
        """Return the places of an update whose samples are not scored in the base context: without dropout the training pass gives it.

        `live`: all, because scoring right before would give the same. `epoch`: those of which no weight depends on it, for the Saliency
        Map; none in the first epoch, which is not scored again, nor where an update has samples of the next, which is scored after it.
        """
        method, epoch = self._method, self._epoch(update, 0)
        if self._drops_out or method.needs_hidden:
            return set()
        targets = {place: self._samples[i].target for place, i in enumerate(self._batches[update])}
        in_base = {place for place, target in targets.items() if target.prompt == "base"}
        if method.references == "live":
            return in_base
        if method.references != "epoch" or epoch == 1:
            return set()
        return {place for place in in_base if not targets[place].needs_base and self._epoch(update, place) == epoch}

    def _epoch(self, update: int, place: int) -> int:
        """Return the epoch of a place of an update, counted from 1: an update may have the last samples of one and the first of another."""
        return (update * self._training.schedule.batch + place) // len(self._samples) + 1

    def _tell(self, update: int, scores: dict[int, Scores]) -> None:
        """Tell scores by their places in an update."""
        if self._training.rescored and scores:
            self._training.rescored([(self._epoch(update, place), self._batches[update][place], s) for place, s in scores.items()])

    def _weights_of(
        self, samples: list[Sample], known: list[Weights] | list[Scores], packed: Pack, hidden_ND: torch.Tensor
    ) -> list[Weights]:
        """Return the weights of a group, made in the training pass, dropout included, of scores that lack the base context."""
        if isinstance(known[0], Weights):
            return known
        method = self._method
        if any(s.target.needs_base for s in samples):
            logp_N = answer_logp(self._model, hidden_ND.detach(), packed.target_ids_N, self._training.plan.head_chunk).cpu()
            known = [
                replace(scores, base_logp_T=logp_T) if sample.target.prompt == "base" else scores
                for sample, scores, logp_T in zip(samples, known, logp_N.split(packed.lengths), strict=True)
            ]
        return [method.weights(sample.target, scores) for sample, scores in zip(samples, known, strict=True)]

    def _on_device(self, weights: list[Weights]) -> tuple[torch.Tensor, torch.Tensor]:
        likelihood_N, unlikelihood_N = (torch.cat(w) for w in zip(*((w.likelihood_T, w.unlikelihood_T) for w in weights), strict=True))
        device = self._model.device
        return likelihood_N.to(device, torch.float32), unlikelihood_N.to(device, torch.float32)


def _logp(scores: Scores, context: Context) -> torch.Tensor:
    """Return the log-probabilities of a context, T; all NaN where it was not scored."""
    found: torch.Tensor | None = getattr(scores, f"{context}_logp_T")
    return torch.full_like(scores.base_logp_T, torch.nan) if found is None else found


def drops_out(model: Any) -> bool:
    """Whether a training pass may drop anything out: by a layer of it, or by what the configuration says."""
    layers = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    says = model.config.get_text_config().to_dict()
    return layers or any("drop" in name and isinstance(rate, int | float) and rate > 0 for name, rate in says.items())
