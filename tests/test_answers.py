"""Rows of answers: what they come to, whether an adapter passes, and how two sets of them are compared."""

from __future__ import annotations

import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import msgspec
import pytest
from conftest import Cli
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu import corpus_chrf
from typer.testing import CliRunner

from edge_agent.answers import ONE_TEXT, Answer, accept, accuracy, compare, free_text, measure, pass_at, read_answers
from edge_agent.cli import app
from edge_agent.errors import AnswersUnusable
from edge_agent.report import Measured, mcnemar

Rule = Literal["not_worse", "better", "always"]


def _verified(*verdicts: list[bool], name: str = "q") -> list[Answer]:
    """One question for each list of verdicts."""
    return [Answer(f"{name}{n}", f"#### {n}", [f"#### {n + (not v)}" for v in vs], vs, 3 * len(vs)) for n, vs in enumerate(verdicts)]


def _single(verdicts: list[bool]) -> list[Answer]:
    return _verified(*([v] for v in verdicts))


def _text(*rows: tuple[float, int]) -> list[Answer]:
    return [Answer(f"q{n}", f"a fine answer {n}", [f"some answer {n}"], [], 4, logp, tokens) for n, (logp, tokens) in enumerate(rows)]


def _write(path: Path, rows: list[Answer]) -> Path:
    path.write_bytes(msgspec.json.Encoder().encode_lines(rows))
    return path


VERDICTS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(VERDICTS)
def test_greedy_answers_have_wilson_and_mcnemar(pairs: list[tuple[bool, bool]]) -> None:
    """One answer a question: shares, their intervals and the paired test are those of verdicts."""
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    measured = measure(_single(before), _single(after))
    assert measured.paired == mcnemar(before, after)
    assert measured.before is not None
    assert measured.before.value == pytest.approx(sum(before) / len(before))
    assert measured.before.low <= measured.before.value <= measured.before.high
    assert measured.pass_before == measured.pass_after == []


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=2, max_size=12))
def test_sampled_answers_have_pass_at_k(verdicts: list[list[bool]]) -> None:
    """Several answers a question: accuracy is the mean share, pass@k grows with k, and pass@all is the share of questions ever solved."""
    answers = _verified(*verdicts)
    share, passes = accuracy(answers), pass_at(answers)
    assert share is not None
    assert share.value == pytest.approx(sum(map(sum, verdicts)) / (4 * len(verdicts)))
    assert [p.k for p in passes] == [2, 4]
    assert share.value - 1e-9 <= passes[0].value <= passes[1].value + 1e-9
    assert passes[1].value == pytest.approx(sum(map(any, verdicts)) / len(verdicts))
    assert all(-1e-9 <= p.low <= p.value + 1e-9 <= p.high + 2e-9 <= 1 + 3e-9 for p in passes)


def test_sampled_answers_are_compared_by_their_shares() -> None:
    """Questions of which more answers are correct are gained; the difference is that of the mean shares."""
    before, after = _verified([True, False], [False, False], [True, True]), _verified([True, True], [False, True], [True, False])
    paired = measure(before, after).paired
    assert paired is not None
    assert (paired.gained, paired.lost, paired.p_value) == (2, 1, 1.0)
    assert paired.difference == pytest.approx(1 / 6)
    assert paired.low <= paired.difference <= paired.high


def test_free_text_is_measured_by_likelihood_and_chrf() -> None:
    """Nats per token over all references, their paired difference, and the chrF that sacrebleu computes itself."""
    rng = random.Random(0)
    lengths = [rng.randint(5, 50) for _ in range(40)]
    before, after = _text(*((-2.0 * n - rng.random(), n) for n in lengths)), _text(*((-1.5 * n - rng.random(), n) for n in lengths))
    measured = measure(before, after)
    assert measured.paired is measured.before is None
    assert measured.text_before is not None
    assert measured.text_difference is not None
    assert measured.text_before.logp == pytest.approx(sum(a.logp or 0 for a in before) / sum(lengths))
    assert (measured.text_before.n, measured.text_before.tokens) == (40, sum(lengths))
    assert measured.text_difference.value == pytest.approx(0.5, abs=0.02)
    assert 0.45 < measured.text_difference.low <= measured.text_difference.value <= measured.text_difference.high < 0.55
    wanted = corpus_chrf([a.outputs[0] for a in before], [[a.answer for a in before]]).score
    assert 0 < measured.text_before.chrf == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("gained", "lost", "rule", "accepted"),
    [
        (0, 0, "not_worse", True),
        (0, 0, "better", False),
        (2, 4, "not_worse", True),
        (0, 20, "not_worse", False),
        (0, 20, "always", True),
        (20, 0, "better", True),
        (4, 2, "better", False),
    ],
)
def test_acceptance_follows_the_interval(gained: int, lost: int, rule: Rule, accepted: bool) -> None:
    """Of 100 questions; the reason in words names the interval."""
    before = _single([False] * gained + [True] * lost + [False] * (100 - gained - lost))
    after = _single([True] * gained + [False] * lost + [False] * (100 - gained - lost))
    verdict, why = accept(measure(before, after), rule)
    assert verdict is accepted
    assert why is not None
    assert f"{gained - lost:+.1f} points" in why


@pytest.mark.parametrize(("change", "rule", "accepted"), [(-0.1, "not_worse", False), (0.1, "better", True), (0.0, "better", False)])
def test_acceptance_of_free_text_follows_the_likelihood(change: float, rule: Rule, accepted: bool) -> None:
    """The paired difference of the log-probabilities takes the place of the accuracy's."""
    before = [(-2.0 * n, n) for n in range(10, 40)]
    verdict, why = accept(measure(_text(*before), _text(*((logp + change * n, n) for logp, n in before))), rule)
    assert verdict is accepted
    assert "nats a token" in str(why)


@pytest.mark.parametrize("rule", ["not_worse", "better"])
@pytest.mark.parametrize(("before", "after"), [([True, False], [True, True]), ([True, True], [True, False])])
def test_one_or_two_questions_decide_nothing(before: list[bool], after: list[bool], rule: Rule) -> None:
    """However they come out, an adapter is neither found better nor worse on them."""
    for count in (1, 2):
        pairs = measure(_verified(*[before] * count), _verified(*[after] * count))
        assert accept(pairs, rule)[0] is (rule == "not_worse")


def test_one_text_has_no_interval() -> None:
    """It is not measured, and the reason says so; two have an interval that is wide."""
    assert measure(_text((-10.0, 5)), _text((-20.0, 5))) == Measured(reason=ONE_TEXT)
    assert free_text(_text((-10.0, 5))) is None
    two = measure(_text((-10.0, 5), (-11.0, 5)), _text((-20.0, 5), (-25.0, 5)))
    assert accept(two, "not_worse")[0] is True


def test_acceptance_of_nothing_is_none() -> None:
    """Nothing held out: neither accepted nor refused, under any rule."""
    for rule in ("not_worse", "better", "always"):
        assert accept(measure([], []), rule) == (None, None)


@given(VERDICTS)
def test_comparison_lists_what_changed(pairs: list[tuple[bool, bool]]) -> None:
    """The lists of gained and lost questions are as long as the paired test counts, or as asked."""
    rows = [_single([p[side] for p in pairs]) for side in (0, 1)]
    measured = measure(*rows)
    assert measured.paired is not None
    with TemporaryDirectory() as place:
        files = [_write(Path(place) / str(side), answers) for side, answers in enumerate(rows)]
        found = compare(files[0], files[1], shared=False, show=1000)
    assert (len(found.gained), len(found.lost)) == (measured.paired.gained, measured.paired.lost)
    assert all(e.correct_after and not e.correct_before for e in found.gained)


def test_files_with_other_questions_are_compared_only_when_asked(tmp_path: Path) -> None:
    """The error says how many are shared; with --shared the answers to those are compared, whatever their order."""
    a = _write(tmp_path / "a.jsonl", _single([True] * 10))
    b = _write(tmp_path / "b.jsonl", _single([False] * 15)[:4:-1])
    run = CliRunner().invoke
    refused = run(app, ["compare", str(a), str(b), "--json"])
    assert refused.exit_code == 3
    error = json.loads(refused.stdout)["error"]
    assert error["code"] == "answers"
    assert "share 5 questions; 5 are only in the first, 5 only in the second" in error["text"]
    found = json.loads(run(app, ["compare", str(a), str(b), "--shared", "--show", "2", "--json"]).stdout)
    assert (found["shared"], found["only_a"], found["only_b"]) == (5, 5, 5)
    assert (found["measured"]["before"]["value"], found["measured"]["after"]["value"]) == (1.0, 0.0)
    assert found["measured"]["paired"]["lost"] == 5
    assert [e["before"] for e in found["lost"]] == ["#### 5", "#### 6"]


def test_a_question_with_another_standard_answer_is_another_question(tmp_path: Path) -> None:
    """Verdicts against different standard answers are not compared."""
    row = _single([True])[0]
    a, b = _write(tmp_path / "a", [row]), _write(tmp_path / "b", [msgspec.structs.replace(row, answer="#### 7")])
    with pytest.raises(AnswersUnusable, match="share 0 questions"):
        compare(a, b, shared=True, show=0)


def test_likelihoods_of_two_tokenizers_are_not_compared(tmp_path: Path) -> None:
    """Nats per token mean something else where the tokens are others."""
    a, b = _write(tmp_path / "a", _text((-9.0, 5))), _write(tmp_path / "b", _text((-9.0, 6)))
    with pytest.raises(AnswersUnusable, match="one tokenizer"):
        compare(a, b, shared=False, show=0)


@pytest.mark.parametrize(
    "line",
    [
        '{"question": "q", "answer": "a"}', '{"question":"q","answer":"a","outputs":[],"verdicts":[],"tokens":0}', "[]", "\xff",
        '{"question":"q","answer":"a","outputs":["a"],"verdicts":[],"tokens":1}',
        '{"question":"q","answer":"a","outputs":["a"],"verdicts":[true,true],"tokens":1}',
        '{"question":"q","answer":"a","outputs":["a"],"verdicts":[],"tokens":1,"logp":-1.0,"reference_tokens":0}',
        '{"question":"q","answer":"a","outputs":["a"],"verdicts":[true],"tokens":1}\n{"question":"Q ","answer":"a","outputs":["a"],'
        '"verdicts":[true],"tokens":1}',
    ],
)  # fmt: skip
def test_a_file_without_answers_is_refused(tmp_path: Path, line: str) -> None:
    """Datasets, rows without outputs, verdicts that do not fit them, and a question that stands twice."""
    (tmp_path / "a.jsonl").write_text(line, encoding="latin-1")
    with pytest.raises(AnswersUnusable, match=r"a\.jsonl"):
        read_answers(tmp_path / "a.jsonl")


def test_a_missing_file_is_refused_with_one_line(tmp_path: Path, cli: Cli) -> None:
    """As for every command: a code, a sentence and an exit code, no traceback."""
    ran = cli("compare", tmp_path / "a", tmp_path)
    assert ran.code == 3
    assert ran.err.startswith("error answers: ")
    assert "Traceback" not in ran.err
