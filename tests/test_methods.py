"""What each method minimises, against its formula computed plainly, and what its gradient must not depend on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Tiny, gradients, judged_records, plan, silent

from edge_agent.job import CutOptions, DftOptions, NlftOptions, Schedule, SftOptions
from edge_agent.training.contexts import Sample
from edge_agent.training.methods.cut import Cut
from edge_agent.training.methods.dft import Dft
from edge_agent.training.methods.method import Context, Method, Scores, Weights
from edge_agent.training.methods.nlft import Nlft
from edge_agent.training.methods.sft import Sft
from edge_agent.training.scoring import score, weigh
from edge_agent.training.weighted import Weighted

Gradients = dict[str, torch.Tensor]
MOVED = 0.05
"""Deviation of the adapter's second matrices: far enough that the adapted model is another one than the base."""
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Tiny:
    return Tiny(tiny_model)


def _logp(model: Any, sample: Sample, context: Context = "base") -> torch.Tensor:
    """Log-probabilities of the answer's tokens by the plain formula, with gradient: one row, no chunks, all logits."""
    prompt, answer = sample.prompts[context], sample.answer
    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def _update(tiny: Tiny, model: Any, method: Method, samples: list[Sample], micro_batch: int = 4) -> tuple[float, Gradients]:
    """Loss and gradients of one update over all the samples."""
    training = tiny.training(method, Path(), Schedule(batch=len(samples), updates=1), micro_batch)
    loss, _ = tiny.objective(model, samples, training).backward(0, silent)
    return loss, gradients(model)


def _assert_same(found: Gradients, wanted: Gradients) -> None:
    assert found.keys() == wanted.keys()
    assert any(g.abs().max() > 1e-3 for g in wanted.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], **CLOSE)


def test_clusters_are_weighed_while_hidden_states_are_there(tiny: Tiny) -> None:
    """Weights that need hidden states equal those of every sample scored alone, and no hidden state is kept."""
    method = Nlft(NlftOptions.released())
    samples = tiny.samples(method, judged_records(3))
    assert method.needs_hidden
    with tiny.adapted(moved=MOVED) as model:
        scores, weights = weigh(model, method, samples, plan(1), tiny.tokenizer.pad_token_id, silent)
        for sample, found, weight in zip(samples, scores, weights, strict=True):
            [(_, alone)] = score(model, [sample], 1, 16, tiny.tokenizer.pad_token_id, silent, hidden=True)
            wanted = method.weights(sample.target, alone)
            assert found.hidden_TD is None
            assert alone.hidden_TD is not None
            torch.testing.assert_close(weight.likelihood_T, wanted.likelihood_T, **CLOSE)
            torch.testing.assert_close(weight.unlikelihood_T, wanted.unlikelihood_T, **CLOSE)


def test_dft_weighs_each_token_by_its_probability_now(tiny: Tiny) -> None:
    """Loss and gradient are those of the mean of sg(b) * -log b, with b of the adapted model and not of the base."""
    method = Dft(DftOptions())
    samples = tiny.samples(method, judged_records(3))
    with tiny.adapted(moved=MOVED) as model:
        loss, found = _update(tiny, model, method, samples, 2)
        logp_N = torch.cat([_logp(model, s) for s in samples])
        wanted = (logp_N.detach().exp() * -logp_N).mean()
        wanted.backward()
        _assert_same(found, gradients(model))
    assert loss == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize(("targets", "texts"), [("answers", "a"), ("outputs", "c"), ("both", "ac")])
def test_dft_takes_the_answers_that_its_option_names(targets: Any, texts: str, tiny: Tiny) -> None:
    """Standard answers, correct outputs or both; never an incorrect output."""
    records = judged_records(2)
    wanted = {"a": {r.answer for r in records}, "c": {r.output for r in records if r.judgment is None}}
    samples = tiny.samples(Dft(DftOptions(targets=targets)), records)
    assert {s.target.text for s in samples} == set().union(*(wanted[t] for t in texts))
    assert len(samples) == 2 * len(texts)


def test_cut_weights_are_those_of_the_paper(tiny: Tiny) -> None:
    """Tokens with j > lambda * b get the unlikelihood weight alpha * j^gamma and no likelihood, all others likelihood 1."""
    options = CutOptions(judge_base_ratio=1.2, unlikelihood_scale=0.5, unlikelihood_power=2.0)
    [first, second] = tiny.samples(Cut(options), judged_records(1)[1:])
    base, judge = torch.tensor([0.5, 0.5, 0.1, 0.9]), torch.tensor([0.59, 0.61, 0.8, 0.1])
    weights = Cut(options).weights(first.target, Scores(base.log(), None, judge.log()))
    assert weights.likelihood_T.tolist() == [1, 0, 0, 1]
    assert weights.unlikelihood_T.tolist() == pytest.approx([0, 0.5 * 0.61**2, 0.5 * 0.8**2, 0])
    weights = Cut(options).weights(second.target, Scores(torch.full((4,), math.nan)))
    assert (weights.likelihood_T.tolist(), weights.unlikelihood_T.tolist()) == ([1] * 4, [0] * 4)


def test_cut_minimises_both_losses_of_the_paper(tiny: Tiny) -> None:
    """Loss and gradient are those of equations 6 and 7, with live b and j, and no gradient through the weights."""
    method = Cut(CutOptions())
    records = judged_records(2)
    samples = tiny.samples(method, records)
    assert [s.target.prompt for s in samples] == ["base", "base", "judge"] * 2
    with tiny.adapted(moved=MOVED) as model:
        loss, found = _update(tiny, model, method, samples, 2)
        total, tokens, flagged = torch.zeros(()), 0, 0
        for correct, wrong, judged in zip(samples[::3], samples[1::3], samples[2::3], strict=True):
            b_T, j_T = _logp(model, wrong).exp(), _logp(model, judged, "judge").exp()
            bad = (j_T > 1.1 * b_T).detach()
            first = b_T[~bad].log().sum() + (j_T[bad].detach() * torch.log(1 - b_T[bad])).sum()
            second = _logp(model, correct).sum() + j_T.log().sum()
            total = total - first - second
            tokens += len(correct.answer) + 2 * len(wrong.answer)
            flagged += int(bad.sum())
        assert flagged
        (total / tokens).backward()
        _assert_same(found, gradients(model))
    assert loss == pytest.approx((total / tokens).item(), rel=1e-4)


def test_cut_with_standard_answers_is_one_option(tiny: Tiny) -> None:
    """The standard answers come on top, one for each question."""
    records = judged_records(2)
    without, with_answers = (tiny.samples(Cut(CutOptions(standard_answers=on)), records) for on in (False, True))
    assert [s.target for s in with_answers[2:]] == [s.target for s in without]
    assert [s.target.text for s in with_answers[:2]] == [records[0].answer, records[2].answer]


def _given(tiny: Tiny, model: Any, method: Method, samples: list[Sample], weights: list[Weights], micro_batch: int = 4) -> Gradients:
    """Gradients of one update over samples whose weights are given."""
    training = tiny.training(method, Path(), Schedule(batch=len(samples), updates=1), micro_batch)
    Weighted(model, samples, weights, training).backward(0, silent)
    return gradients(model)


@pytest.mark.parametrize("references", ["live", "once"])
def test_gradient_flows_through_the_base_row_only(references: Any, tiny: Tiny) -> None:
    """With the standard and judge contexts there, or with their weights alone and the contexts gone: the same gradient."""
    method, fixed = Nlft(NlftOptions(references=references)), Nlft(NlftOptions(references="once"))
    samples = tiny.samples(method, judged_records(2))
    bare = [dataclasses.replace(s, prompts={"base": s.prompts["base"]}) for s in samples]
    assert {c for s in samples for c in s.prompts} == {"base", "standard", "judge"}
    with tiny.adapted(moved=MOVED) as model:
        weights = tiny.weights(model, method, samples)
        with_contexts = _given(tiny, model, method, samples, weights)
        _assert_same(with_contexts, _given(tiny, model, fixed, bare, weights))
        # Nothing of the other contexts is left either: other prompts in them, same gradient.
        strange = [dataclasses.replace(s, prompts={c: p if c == "base" else p[::-1] for c, p in s.prompts.items()}) for s in samples]
        _assert_same(with_contexts, _given(tiny, model, fixed, strange, weights))


def test_mixed_batch_is_the_sum_of_its_records(tiny: Tiny) -> None:
    """Correct and incorrect outputs in one update: the gradients of each alone, added up in proportion to their tokens."""
    method = Nlft(NlftOptions())
    samples = tiny.samples(method, judged_records(2))
    assert {s.target.kind for s in samples} == {"correct", "incorrect"}
    with tiny.adapted(moved=MOVED) as model:
        weights = tiny.weights(model, method, samples)
        assert any((w.unlikelihood_T > 0).any() for w in weights)
        mixed = _given(tiny, model, method, samples, weights)
        total = sum(len(s.answer) for s in samples)
        added = {name: torch.zeros_like(g) for name, g in mixed.items()}
        for sample, weight in zip(samples, weights, strict=True):
            for name, g in _given(tiny, model, method, [sample], [weight]).items():
                added[name] += g * len(sample.answer) / total
    _assert_same(mixed, added)


METHODS = [
    pytest.param(Nlft(NlftOptions(references="live")), id="nlft"),
    pytest.param(Sft(SftOptions(targets="both")), id="sft"),
    pytest.param(Dft(DftOptions(targets="both")), id="dft"),
    pytest.param(Cut(CutOptions()), id="cut"),
]


@pytest.mark.parametrize("method", METHODS)
def test_gradient_does_not_depend_on_how_a_batch_is_computed(method: Method, tiny: Tiny) -> None:
    """Neither on the size of micro-batches, and so on padding, nor on the order of the samples."""
    samples = tiny.samples(method, judged_records(2))
    assert len({s.longest for s in samples}) > 2
    with tiny.adapted(moved=MOVED) as model:
        weights = tiny.weights(model, method, samples)
        wanted = _given(tiny, model, method, samples, weights, len(samples))
        for size, step in ((1, 1), (3, -1)):
            _assert_same(_given(tiny, model, method, samples[::step], weights[::step], size), wanted)


@pytest.mark.parametrize("method", [METHODS[0], METHODS[3]])
def test_weights_do_not_depend_on_what_is_scored_beside_them(method: Method, tiny: Tiny) -> None:
    """A sample has the same weights alone and among longer and shorter ones, in any order."""
    samples = tiny.samples(method, judged_records(2))
    with tiny.adapted(moved=MOVED) as model:
        together = tiny.weights(model, method, samples[::-1])[::-1]
        for sample, weights in zip(samples, together, strict=True):
            [alone] = tiny.weights(model, method, [sample])
            torch.testing.assert_close(weights.likelihood_T, alone.likelihood_T, **CLOSE)
            torch.testing.assert_close(weights.unlikelihood_T, alone.unlikelihood_T, **CLOSE)
    assert any((w.unlikelihood_T > 0).any() for w in together)
