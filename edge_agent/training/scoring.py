"""Scores the answers in their contexts, without gradient and with dropout off, and turns the scores into token weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from typing import Any

import torch

from edge_agent.training.contexts import Sample
from edge_agent.training.head import answer_logp
from edge_agent.training.methods.method import Context, Method, Scores, Weights
from edge_agent.training.packing import answer_hidden, longest_first, pack
from edge_agent.training.reporter import OnProgress
from quantization.plan import Plan

OnHidden = Callable[[int, torch.Tensor], None]
"""Hears the number of a sample and the hidden states of its base context, T x D, on the device."""


def unheard(_: int, __: torch.Tensor) -> None:
    """Nobody needs the hidden states."""


@torch.no_grad()
def score(
    model: Any, samples: list[Sample], batch: int, chunk: int, pad_id: int, progress: Callable[[int, int, int], None],
    hidden: bool = False, of_pass: Set[int] = frozenset(), on_hidden: OnHidden = unheard,
) -> Iterator[tuple[int, Scores]]:  # fmt: skip
    """Yield (index, scores) of each sample once its last context is scored, on the CPU.

    `batch` contexts are scored at once; `progress` hears (done, total, tokens). With `hidden`, base contexts come last, so that no hidden
    state has to wait for another context of its sample. The base context of the samples `of_pass` is left out, and is all NaN: their
    training pass will give it.
    """
    model.eval()
    logp: dict[tuple[int, Context], torch.Tensor] = {}
    for i in of_pass:
        logp[i, "base"] = unscored(samples[i])
        if len(samples[i].prompts) == 1:
            yield i, Scores(logp.pop((i, "base")))
    work = [(i, context) for i, sample in enumerate(samples) for context in sample.prompts if context != "base" or i not in of_pass]
    rows = [(samples[i].prompts[context], samples[i].answer) for i, context in work]
    work = [work[n] for n in longest_first(rows)]
    if hidden:
        work.sort(key=lambda w: w[1] == "base")
    open_ = Counter(i for i, _ in work)
    for start in range(0, len(work), batch):
        group = work[start : start + batch]
        packed = pack(model, [(samples[i].prompts[c], samples[i].answer) for i, c in group], pad_id)
        hidden_ND = answer_hidden(model, packed)
        logp_N = answer_logp(model, hidden_ND, packed.target_ids_N, chunk).cpu()
        progress(min(start + batch, len(work)), len(work), packed.tokens)
        for (i, context), logp_T, hidden_TD in zip(group, logp_N.split(packed.lengths), hidden_ND.split(packed.lengths), strict=True):
            logp[i, context] = logp_T
            if context == "base":
                on_hidden(i, hidden_TD)
            open_[i] -= 1
            if not open_[i]:
                standard, judge = logp.pop((i, "standard"), None), logp.pop((i, "judge"), None)
                hidden_TD = hidden_TD.float().cpu() if hidden else None
                yield i, Scores(logp.pop((i, "base")), standard, judge, hidden_TD)


def unscored(sample: Sample) -> torch.Tensor:
    """Return what stands for the log-probabilities of a sample that are not known, T."""
    return torch.full((len(sample.answer),), torch.nan)


def score_all(
    model: Any, method: Method, samples: list[Sample], plan: Plan, pad_id: int, progress: OnProgress, of_pass: Set[int] = frozenset(),
    on_hidden: OnHidden = unheard,
) -> Iterator[tuple[int, Scores]]:  # fmt: skip
    """Yield (index, scores) of every sample, in no order, with what the method asks for; `of_pass` and `on_hidden` as `score` has them."""

    def count(done: int, total: int, tokens: int) -> None:
        progress(done, total, tokens, None, "score")

    scored = [i for i, s in enumerate(samples) if s.target.contexts is not None]
    yield from ((i, Scores(unscored(s))) for i, s in enumerate(samples) if s.target.contexts is None)
    found = score(
        model, [samples[i] for i in scored], 2 * plan.micro_batch, plan.head_chunk, pad_id, count, method.needs_hidden,
        {place for place, i in enumerate(scored) if i in of_pass},
        lambda place, hidden_TD: on_hidden(scored[place], hidden_TD),
    )  # fmt: skip
    yield from ((scored[place], scores) for place, scores in found)


def weigh(
    model: Any, method: Method, samples: list[Sample], plan: Plan, pad_id: int, progress: OnProgress, of_pass: Set[int] = frozenset(),
    on_hidden: OnHidden = unheard,
) -> tuple[list[Scores], list[Weights]]:  # fmt: skip
    """Return the scores that a method asks for, without hidden states, and the weights that it makes of them; the rest as above."""
    found: dict[int, tuple[Scores, Weights]] = {}
    for i, scores in score_all(model, method, samples, plan, pad_id, progress, of_pass, on_hidden):
        found[i] = replace(scores, hidden_TD=None), method.weights(samples[i].target, scores)
    every = [found[i] for i in range(len(samples))]
    return [scores for scores, _ in every], [weights for _, weights in every]
