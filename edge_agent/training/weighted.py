"""The objective of all methods that weigh the tokens of given answers: weighted likelihood and unlikelihood, in micro-batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from edge_agent.training.checkpoint import Tensors
from edge_agent.training.contexts import Sample
from edge_agent.training.head import answer_logp, weighted_loss
from edge_agent.training.loop import Training, check_finite, learning_rate, order, starts_epoch, trained
from edge_agent.training.methods.method import Scores, Weights
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
        self._batches = order(len(samples), training.schedule, training.seed)
        self.updates = len(self._batches)
        self.parameters = trained(model)
        self._drops_out = drops_out(model)

    def learning_rate(self, update: int) -> float:
        return learning_rate(update, self.updates, self._training.schedule)

    def ends_epoch(self, update: int) -> bool:
        return update + 1 == self.updates or starts_epoch(update + 1, len(self._samples), self._training.schedule.batch)

    def state(self) -> Tensors:
        if self._training.method.references != "epoch":
            return {}  # scored again in any case
        return {
            "likelihood": torch.cat([w.likelihood_T for w in self._weights]),
            "unlikelihood": torch.cat([w.unlikelihood_T for w in self._weights]),
        }

    def restore(self, state: Tensors) -> None:
        lengths = [len(w.likelihood_T) for w in self._weights]
        pairs = zip(state["likelihood"].split(lengths), state["unlikelihood"].split(lengths), strict=True)
        self._weights = [Weights(likelihood_T, unlikelihood_T) for likelihood_T, unlikelihood_T in pairs]

    def backward(self, update: int, progress: OnProgress) -> tuple[float, int]:
        """Add up the gradients of one update. The longest samples come first."""
        of_update = self._batches[update]
        places = longest_first([self._row(self._samples[i]) for i in of_update])
        samples = [self._samples[of_update[place]] for place in places]
        known = self._known(update, places, samples, progress)
        self._model.train()
        plan, seed = self._training.plan, self._training.seed
        answer_tokens = sum(len(s.answer) for s in samples)
        loss, tokens, size = 0.0, 0, plan.micro_batch
        for start in range(0, len(samples), size):
            group = samples[start : start + size]
            packed = pack(self._model, [self._row(s) for s in group], self._training.tokenizer.pad_token_id)
            torch.manual_seed(hash((seed, update, start)) & 0x7FFFFFFF)  # dropout; integers hash the same in every process
            hidden_ND = answer_hidden(self._model, packed, plan.offload_checkpoints)
            part_of = slice(start, start + size)
            likelihood_N, unlikelihood_N = self._on_device(self._weights_of(update, places[part_of], known[part_of], packed, hidden_ND))
            total = weighted_loss(self._model, hidden_ND, packed.target_ids_N, likelihood_N, unlikelihood_N, plan.head_chunk)
            part = total / answer_tokens
            part.backward()
            loss += part.item()
            tokens += packed.tokens
        check_finite(loss, update, samples)
        return loss, tokens

    @staticmethod
    def _row(sample: Sample) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Prompt and answer that are trained on."""
        return sample.prompts[sample.target.prompt], sample.answer

    def _known(self, update: int, places: list[int], samples: list[Sample], progress: OnProgress) -> list[Weights] | list[Scores]:
        """Return the weights of the samples at places of an update, or scores that the training pass has to complete first.

        They are renewed where the method asks for it. A pass without dropout gives the base context as scoring it would.
        """
        method, plan, pad_id = self._training.method, self._training.plan, self._training.tokenizer.pad_token_id
        if method.references == "epoch" and starts_epoch(update, len(self._samples), self._training.schedule.batch):
            scores, self._weights = weigh(self._model, method, self._samples, plan, pad_id, progress)
            if self._training.rescored:
                epoch = update * self._training.schedule.batch // len(self._samples) + 1
                self._training.rescored([(epoch, i, s) for i, s in enumerate(scores)])
        if method.references == "pass":
            return [Scores(unscored(s)) for s in samples]
        if method.references != "live":
            return [self._weights[self._batches[update][place]] for place in places]

        def told(done: int, total: int, tokens: int, *_: object) -> None:
            progress(update, self.updates, tokens, None, "score")  # the rows of one update are no progress that a person could follow

        if self._drops_out or method.needs_hidden:
            scores, weights = weigh(self._model, method, samples, plan, pad_id, told)
            self._tell(update, places, scores)
            return weights
        found = dict(score_all(self._model, method, samples, plan, pad_id, told, of_pass=True))
        return [found[i] for i in range(len(samples))]

    def _tell(self, update: int, places: list[int], scores: list[Scores]) -> None:
        """Tell the scores of samples at places of an update, which may have the last samples of an epoch and the first of the next."""
        if self._training.rescored:
            before, of_update = update * self._training.schedule.batch, self._batches[update]
            told = ((before + n) // len(self._samples) + 1 for n in places)
            self._training.rescored([*zip(told, (of_update[n] for n in places), scores, strict=True)])

    def _weights_of(
        self, update: int, places: list[int], known: list[Weights] | list[Scores], packed: Pack, hidden_ND: torch.Tensor
    ) -> list[Weights]:
        """Return the weights of a group, made in the training pass, dropout included, of scores that lack the base context."""
        if isinstance(known[0], Weights):
            return known
        method = self._training.method
        logp_N = answer_logp(self._model, hidden_ND.detach(), packed.target_ids_N, self._training.plan.head_chunk).cpu()
        samples = [self._samples[self._batches[update][place]] for place in places]
        complete = [
            replace(scores, base_logp_T=logp_T) if sample.target.prompt == "base" else scores
            for sample, scores, logp_T in zip(samples, known, logp_N.split(packed.lengths), strict=True)
        ]
        self._tell(update, places, complete)
        return [method.weights(sample.target, scores) for sample, scores in zip(samples, complete, strict=True)]

    def _on_device(self, weights: list[Weights]) -> tuple[torch.Tensor, torch.Tensor]:
        likelihood_N, unlikelihood_N = (torch.cat(w) for w in zip(*((w.likelihood_T, w.unlikelihood_T) for w in weights), strict=True))
        device = self._model.device
        return likelihood_N.to(device, torch.float32), unlikelihood_N.to(device, torch.float32)


def drops_out(model: Any) -> bool:
    """Whether a training pass may drop anything out: by a layer of it, or by what the configuration says."""
    layers = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    says = model.config.get_text_config().to_dict()
    return layers or any("drop" in name and isinstance(rate, int | float) and rate > 0 for name, rate in says.items())
