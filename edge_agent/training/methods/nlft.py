"""Natural Language Fine-Tuning (arXiv 2412.20382, section 3): token weights from what the contexts change.

With b, c, j the probabilities of a token in the base, standard and judge context. A correct output is imitated, most of all
where c is high. Of an incorrect output those tokens are made unlikely which the judgment, and not the standard answer, makes
likely. Weights are constants: no gradient flows through them.

Shapes: T answer tokens, D hidden size, S seeds of clusters.
"""

from __future__ import annotations

import math

import torch

from edge_agent.dataset import Record
from edge_agent.job import NlftOptions
from edge_agent.training.methods.method import Context, IsCorrect, Kind, OwnOutputs, Scores, Target, Timing, Weights
from edge_agent.training.methods.sft import standard_answers


def log_complement(logp: torch.Tensor) -> torch.Tensor:
    """Return log(1 - exp(logp)) without loss of digits at either end."""
    return torch.where(logp > -math.log(2), torch.log(-torch.expm1(logp)), torch.log1p(-torch.exp(logp)))


def token_weights(
    kind: Kind,
    base_logp_T: torch.Tensor,
    standard_logp_T: torch.Tensor | None,
    judge_logp_T: torch.Tensor | None,
    hidden_TD: torch.Tensor | None,
    options: NlftOptions,
) -> Weights:
    """Return the weights of an answer's tokens; the loss is the mean over T of likelihood * -log b + unlikelihood * -log(1 - b).

    `standard_logp_T` is None for a record without a standard answer: a correct output weighs 1 everywhere then, and of an incorrect
    one the judgment alone decides. `judge_logp_T` is needed for incorrect outputs, `hidden_TD` (the states that predict each token in
    the base context) where `options.cluster` is not "none".
    """
    if kind == "correct":
        return _correct(base_logp_T, standard_logp_T, hidden_TD, options)
    if judge_logp_T is None:
        raise ValueError("an incorrect output has no weights without the log-probabilities of its judge context")
    return _incorrect(base_logp_T, standard_logp_T, judge_logp_T, hidden_TD, options)


def _correct(base_logp_T: torch.Tensor, standard_logp_T: torch.Tensor | None, hidden_TD: torch.Tensor | None, o: NlftOptions) -> Weights:
    zero_T = torch.zeros_like(base_logp_T)
    if standard_logp_T is None:
        return Weights(zero_T + 1, zero_T)
    c_T = standard_logp_T.exp()
    scoring_T = c_T > o.correct_threshold
    joined_T = cluster(hidden_TD, scoring_T, o)
    relative_T = c_T / o.correct_threshold
    boost_T = 1 + ((c_T - o.correct_threshold) / (1 - o.correct_threshold)).clamp(min=0) ** o.correct_boost_power
    other_T = torch.where(joined_T, relative_T**o.correct_cluster_power, relative_T**o.correct_other_power)
    return Weights(torch.where(scoring_T, boost_T, other_T), zero_T)


def _incorrect(
    base_logp_T: torch.Tensor,
    standard_logp_T: torch.Tensor | None,
    judge_logp_T: torch.Tensor,
    hidden_TD: torch.Tensor | None,
    o: NlftOptions,
) -> Weights:
    over_base_T = (judge_logp_T - base_logp_T).exp()
    losing_T = (over_base_T > o.judge_base_ratio) & (judge_logp_T.exp() > o.judge_minimum)
    if standard_logp_T is not None:
        losing_T &= (judge_logp_T - standard_logp_T).exp() > o.judge_standard_ratio
    zero_T = torch.zeros_like(base_logp_T)
    unlikelihood_T = torch.where(losing_T, o.unlikelihood_scale * torch.sigmoid(over_base_T - o.judge_base_ratio), zero_T)
    imitate = o.imitate_incorrect and losing_T.double().mean().item() <= o.imitate_flagged_share
    if standard_logp_T is None or not imitate:
        return Weights(zero_T, unlikelihood_T)
    joined_T = cluster(hidden_TD, losing_T, o)
    return Weights(torch.where(joined_T, zero_T, (standard_logp_T / 2).exp()), unlikelihood_T)


def cluster(hidden_TD: torch.Tensor | None, seeds_T: torch.Tensor, o: NlftOptions) -> torch.Tensor:
    """Return the mask of the seeds and the neighbours that join them, walking left and right from every seed.

    "like": a neighbour joins while its cosine distance to the running mean of the walk is at most `cluster_distance`; each walk
    starts from the seed. "unlike" repeats the released walk: it joins while the distance is greater, the centre is the mean of
    itself and the neighbour, and the right walk goes on with the centre of the left one. All seeds walk at once, a step at a time,
    and nothing is read back to the host on the way.
    """
    if o.cluster == "none":
        return seeds_T.clone()
    if hidden_TD is None:
        raise ValueError("clustering needs the hidden states")
    length, seeds_S = len(seeds_T), seeds_T.nonzero().flatten()
    joins_T = seeds_T.long()
    centre_SD = hidden_TD[seeds_S]
    for direction in (-1, 1):
        if o.cluster == "like":
            centre_SD = hidden_TD[seeds_S]
        walking_S = torch.ones_like(seeds_S, dtype=torch.bool)
        for step in range(1, min(o.cluster_max_span or length, length - 1) + 1):
            at_S = seeds_S + direction * step
            walking_S = walking_S & (at_S >= 0) & (at_S < length)
            at_S = at_S.clamp(0, length - 1)
            distance_S = 1 - torch.cosine_similarity(centre_SD, hidden_TD[at_S], dim=1)
            walking_S = walking_S & ((distance_S > o.cluster_distance) == (o.cluster == "unlike"))
            joins_T.index_add_(0, at_S, walking_S.long())
            share = 1 / (step + 1) if o.cluster == "like" else 0.5
            centre_SD = torch.where(walking_S[:, None], centre_SD + (hidden_TD[at_S] - centre_SD) * share, centre_SD)
    return joins_T > 0


class Nlft:
    """NLFT as a method: outputs by their verdict, standard answers as correct outputs."""

    own_outputs: OwnOutputs = "before"
    contexts: tuple[Context, ...] = ("standard", "judge")
    trained_in: tuple[Context, ...] = ("base",)

    def __init__(self, options: NlftOptions) -> None:
        self._options = options
        self.needs_hidden = options.cluster != "none"
        self.turning_ratio: float | None = options.turning_ratio if options.repair else None
        self.references: Timing = options.references

    def targets(self, records: list[Record], is_correct: IsCorrect) -> list[Target]:
        chosen = standard_answers(records, ("standard",), self.needs_hidden) if self._options.standard_answers else []
        for record in records:
            if record.output is None:
                continue
            standard: tuple[Context, ...] = ("standard",) if record.answer is not None else ()
            if is_correct(record):
                chosen.append(Target(record, record.output, "correct", standard, needs_base=self.needs_hidden))
            elif record.judgment is not None:
                chosen.append(Target(record, record.output, "incorrect", (*standard, "judge")))
        return chosen

    def weights(self, target: Target, scores: Scores) -> Weights:
        return token_weights(target.kind, scores.base_logp_T, scores.standard_logp_T, scores.judge_logp_T, scores.hidden_TD, self._options)
