"""What the trainer keeps for the Saliency Map: products of hidden states, texts of tokens, scores of later epochs, all within bounds."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import torch

from edge_agent.dataset import Record
from edge_agent.job import NlftOptions
from edge_agent.saliency import Saliency
from edge_agent.training import saliency_scores
from edge_agent.training.contexts import Sample
from edge_agent.training.methods.method import Scores, Target, Weights
from edge_agent.training.saliency_scores import Rescorings, SaliencyParts, inner_products, product_spans, token_texts
from edge_agent.training.slots import Slots
from quantization.load import load_tokenizer
from quantization.model_files import find_model


def _samples(*lengths: int) -> list[Sample]:
    target = Target(Record("How many?", "Four."), "Four.", "correct", ("standard",))
    return [Sample(target, tuple(range(length)), {}) for length in lengths]


@pytest.mark.parametrize(("length", "span"), [(1, 0), (5, 4), (64, 32), (150, 32), (150, 149), (200, 70)])
def test_inner_products_are_those_of_each_state_with_the_ones_before_it(length: int, span: int) -> None:
    """Row t has the products of state t with t, t - 1 and so on, in 32 bits, and 0 where there is no such state."""
    states_TD = torch.randn(length, 16, generator=torch.Generator().manual_seed(1))
    products_TP = inner_products(states_TD.bfloat16(), span)
    whole_TT = states_TD.bfloat16().float() @ states_TD.bfloat16().float().T
    assert products_TP.shape == (length, span + 1)
    for back in range(span + 1):
        torch.testing.assert_close(products_TP[back:, back], whole_TT.diagonal(-back))
        assert (products_TP[:back, back] == 0).all()


def test_products_are_kept_as_far_as_walks_go_and_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 states back at least, further for the job's own walks, within the length of the answer, and none once the room is used up."""
    samples = _samples(10, 100, 200)
    assert product_spans(samples, NlftOptions()) == [9, 32, 32]
    assert product_spans(samples, NlftOptions(cluster="like", cluster_max_span=50)) == [9, 50, 50]
    assert product_spans(samples, NlftOptions(cluster="unlike", cluster_max_span=50)) == [9, 99, 100]
    assert product_spans(samples, NlftOptions.released()) == [9, 99, 199]
    monkeypatch.setattr(saliency_scores, "MAX_PRODUCTS_BYTES", 4 * (10 * 10 + 100 * 33))
    assert product_spans(samples, NlftOptions.released()) == [9, 32]


def test_texts_of_tokens_together_are_the_answer(tiny_model: Path) -> None:
    """Blanks stay where they are, and a character that is spread over tokens belongs to its last."""
    tokenizer = load_tokenizer(find_model(str(tiny_model)))
    for text in ("Ana has <<7*5=35>>35 stamps.\n#### 35", " two  blanks ", "naïve 日本語 🙂👩‍👩‍👧 e\u0301", "\n\n\t"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == tokenizer.decode(ids)


def test_file_has_a_bound_and_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path) -> None:
    """The first answers come in as long as there is room, the others are counted; then as many epochs as there is room for, evenly."""
    tokenizer = load_tokenizer(find_model(str(tiny_model)))
    samples = _samples(4, 6, 50)
    monkeypatch.setattr(saliency_scores, "MAX_TOKENS", 30)
    parts = SaliencyParts(tmp_path, samples, NlftOptions(), epochs=6)
    for epoch in range(1, 7):
        parts.rescorings.add([(epoch, i, Scores(torch.full((len(s.answer),), -float(epoch)))) for i, s in enumerate(samples)])
    for i, sample in enumerate(samples):
        parts.products.add(i, torch.ones(len(sample.answer), 2))
    scores = [Scores(torch.tensor([-0.5] * len(s.answer))) for s in samples]
    weights = [Weights(torch.ones(len(s.answer)), torch.zeros(len(s.answer))) for s in samples]
    saliency = msgspec.json.decode(b"".join(parts.file(tokenizer, scores, weights)), type=Saliency)
    assert saliency.left_out == 1
    assert [len(r.tokens) for r in saliency.records] == [4, 6]
    assert [[s.epoch for s in r.rescored] for r in saliency.records] == [[3, 6], [3, 6]]
    assert saliency.records[1].rescored[1].base == [-6.0] * 6
    assert saliency.records[0].base == [-0.5] * 4
    assert [len(r.products or b"") for r in saliency.records] == [4 * 4 * 4, 4 * 6 * 6]


def test_scores_that_are_taken_again_count_once(tmp_path: Path) -> None:
    """A run that goes on from a checkpoint repeats updates: what was there of them is replaced, what came before them stays."""
    samples = _samples(4, 6)
    first = Rescorings(tmp_path, samples, epochs=2)
    first.add([(1, 0, Scores(torch.full((4,), -1.0), judge_logp_T=torch.full((4,), -2.0))), (2, 0, Scores(torch.full((4,), -3.0)))])
    again = Rescorings(tmp_path, samples, epochs=2)
    again.add([(2, 0, Scores(torch.full((4,), -7.0)))])
    assert [(s.base[0], s.standard, s.judge and s.judge[0]) for s in Rescorings(tmp_path, samples, epochs=2).of(0)] == [
        (-1.0, None, -2.0),
        (-7.0, None, None),
    ]
    assert again.of(1) == []


def test_a_slot_is_whole_or_not_there(tmp_path: Path) -> None:
    """In any order, and again; what was never written, or cut off, is not there; only its owner reads the file."""
    slots = Slots(tmp_path / "file", [3, 0, 2])
    assert [slots.read(n) for n in range(3)] == [None, None, None]
    slots.write(2, b"xy")
    slots.write(1, b"")
    assert [slots.read(n) for n in range(3)] == [None, b"", b"xy"]
    slots.write(0, b"123")
    slots.write(0, b"456")
    slots.write(0, b"789", turn=1)
    again = Slots(tmp_path / "file", [3, 0, 2])
    assert [again.read(n) for n in range(3)] == [b"456", b"", b"xy"]
    assert [again.read(n, turn=1) for n in range(3)] == [b"789", None, None]
    with pytest.raises(ValueError, match="2 bytes do not fill the 3 of slot 0"):
        slots.write(0, b"12")
    os.truncate(tmp_path / "file", 7)
    assert slots.read(2) is None
    assert (tmp_path / "file").stat().st_mode & 0o077 == 0
