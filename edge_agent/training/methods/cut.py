"""Contrastive Unlikelihood Training (arXiv 2312.14591, section 4.2), with b and j the probabilities in the base and judge context.

Of an incorrect output the tokens with j > lambda * b are made unlikely with the weight alpha * j^gamma and the others are imitated
(L1, equation 6); given its judgment, all of it is imitated (second part of L2, equation 7). A correct output is imitated (first
part of L2). L1 and L2 are two targets, so an incorrect output counts twice in a batch, as both losses are added up in the paper.

The paper finds the tokens of L1 against a prompt with an invented positive judgment; here, as in its released code, against the
prompt without one.
"""

from __future__ import annotations

import math

import torch

from edge_agent.dataset import Record
from edge_agent.job import CutOptions
from edge_agent.training.methods.method import Context, IsCorrect, OwnOutputs, Scores, Target, Timing, Weights
from edge_agent.training.methods.sft import standard_answers


class Cut:
    """See the module's text."""

    needs_hidden = False
    own_outputs: OwnOutputs = "before"
    contexts: tuple[Context, ...] = ("judge",)
    turning_ratio: float | None = None
    trained_in: tuple[Context, ...] = ("base", "judge")

    def __init__(self, options: CutOptions) -> None:
        self._options = options
        self.references: Timing = options.references

    def targets(self, records: list[Record], is_correct: IsCorrect) -> list[Target]:
        chosen = standard_answers(records) if self._options.standard_answers else []
        for record in records:
            if record.output is None:
                continue
            if is_correct(record):
                chosen.append(Target(record, record.output, "correct"))
            elif record.judgment is not None:
                chosen.append(Target(record, record.output, "incorrect", ("judge",)))
                chosen.append(Target(record, record.output, "incorrect", prompt="judge"))
        return chosen

    def weights(self, target: Target, scores: Scores) -> Weights:
        one_T, zero_T = torch.ones_like(scores.base_logp_T), torch.zeros_like(scores.base_logp_T)
        if scores.judge_logp_T is None:
            return Weights(one_T, zero_T)
        o = self._options
        inappropriate_T = scores.judge_logp_T - scores.base_logp_T > math.log(o.judge_base_ratio)
        unlikelihood_T = o.unlikelihood_scale * (o.unlikelihood_power * scores.judge_logp_T).exp()
        return Weights(torch.where(inappropriate_T, zero_T, one_T), torch.where(inappropriate_T, unlikelihood_T, zero_T))
