"""Supervised fine-tuning: weight 1 on every token of the standard answers, of the correct outputs, or of both."""

from __future__ import annotations

import torch

from edge_agent.dataset import Record
from edge_agent.job import DftOptions, SftOptions
from edge_agent.training.methods.method import Context, IsCorrect, OwnOutputs, Scores, Target, Timing, Weights


def standard_answers(records: list[Record], contexts: tuple[Context, ...] | None = None, needs_base: bool = True) -> list[Target]:
    """One target for every standard answer of each question; none for records without one."""
    first = {(r.instruction, r.question, r.answer): r for r in reversed(records)}
    return [
        Target(r, r.answer, "correct", contexts, needs_base=needs_base, standard_answer=True)
        for r in first.values()
        if r.answer is not None
    ][::-1]


class Sft:
    """See the module's text."""

    needs_hidden = False
    contexts: tuple[Context, ...] = ()
    turning_ratio: float | None = None
    references: Timing = "once"
    trained_in: tuple[Context, ...] = ("base",)

    def __init__(self, options: SftOptions | DftOptions) -> None:
        self._options = options
        self.own_outputs: OwnOutputs = "never" if options.targets == "answers" else "before"

    def targets(self, records: list[Record], is_correct: IsCorrect) -> list[Target]:
        answers = standard_answers(records)
        outputs = [Target(r, r.output, "correct") for r in records if r.output is not None and is_correct(r)]
        return {"answers": answers, "outputs": outputs, "both": answers + outputs}[self._options.targets]

    def weights(self, target: Target, scores: Scores) -> Weights:
        ones_T = torch.ones_like(scores.base_logp_T)
        return Weights(ones_T, torch.zeros_like(ones_T))
