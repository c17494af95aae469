"""The parts of a split never share a question, and are a function of the records and the seed."""

from __future__ import annotations

from itertools import chain
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.dataset import Record
from edge_agent.errors import DatasetEmpty, JobSchema
from edge_agent.job import Job
from edge_agent.splitting import split


def _job(**evaluation: object) -> Job:
    limit, seed = evaluation.pop("limit", None), evaluation.pop("seed", 42)
    dataset = {"sha256": "0" * 64, "limit": limit}
    return msgspec.convert({"model": "m", "dataset": dataset, "budget_bytes": 1, "seed": seed, "evaluation": evaluation}, type=Job)


# Few questions, in spellings that are one question, with and without a reference.
spelled = st.builds(str.format, st.sampled_from(["Question {}", " question  {}\n", "ＱUESTION\t{} "]), st.integers(0, 12))
drawn = st.lists(
    st.builds(
        lambda question, parts: Record(question, *parts),
        spelled,
        st.sampled_from([("1", None, None), ("2", "3", "no"), (None, "4", None), (None, "5", "bad"), (None, "6", "worse")]),
    ),
    min_size=1,
    max_size=40,
)
shares = st.sampled_from([0.0, 0.1, 0.3, 0.5])
folds = st.builds(lambda of, i: {"fold": i % of + 1, "of": of}, st.integers(2, 6), st.integers(0, 99))
jobs = st.builds(
    _job,
    held_out=shares | folds,
    development=shares,
    questions=st.sampled_from([0, 2, 300]),
    limit=st.none() | st.integers(1, 15),
    seed=st.integers(0, 3),
)


def _key(record: Record) -> int:
    """The number in the text of a drawn question, which all of its spellings share."""
    return int(record.question.split()[1])


@settings(max_examples=300)
@given(drawn, st.none() | drawn, jobs, st.randoms(use_true_random=False))
def test_parts_never_share_a_question(records: list[Record], evaluation: list[Record] | None, job: Job, random: Any) -> None:
    """For any records and any job: parts are disjoint, whole questions, within their numbers, and the same in any order of the file."""
    try:
        parts = split(records, evaluation, job)
    except (DatasetEmpty, JobSchema) as error:
        shuffled = random.sample(records, len(records))
        with pytest.raises(type(error)):
            split(shuffled, evaluation, job)
        return
    training, development, held_out = ({_key(r) for r in part} for part in (parts.training, parts.development, parts.held_out))
    assert not training & development
    assert not (training | development) & held_out
    assert not (training | development) & {_key(r) for r in evaluation or []}
    assert sorted(map(repr, parts.training + parts.development)) == sorted(repr(r) for r in records if _key(r) in training | development)
    assert len(held_out) == len(parts.held_out) <= job.evaluation.questions
    assert all(r.reference is not None and r in (records if evaluation is None else evaluation) for r in parts.held_out)
    assert len(training | development) <= (job.dataset.limit or len(records))
    assert len(development) == round(job.evaluation.development * len(training | development))
    assert split(random.sample(records, len(records)), evaluation, job) == parts


def test_a_question_is_measured_by_its_first_reference() -> None:
    """Of an evaluation file as of a dataset; a later record of the question without one does not take it away."""
    evaluation = [Record("q", "1"), Record("q", None, "3", "Wrong."), Record("Q ", "2")]
    assert split([Record("other", "1")], evaluation, _job()).held_out == evaluation[:1]


@given(drawn, st.integers(2, 6), st.integers(0, 3))
def test_folds_partition_the_questions(records: list[Record], of: int, seed: int) -> None:
    """Every question that can be measured is held out in exactly one fold, and the folds differ by one question at most."""
    measurable = {_key(r) for r in records if r.reference is not None}
    jobs = [_job(held_out={"fold": i + 1, "of": of}, seed=seed) for i in range(of)]
    if len(measurable) < of:
        with pytest.raises(JobSchema, match=f"do not make {of} folds"):
            split(records, None, jobs[0])
        return
    parts = [split(records, None, job).held_out for job in jobs]
    assert sorted(_key(r) for r in chain(*parts)) == sorted(measurable)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.sampled_from([0.2, {"fold": 1, "of": 5}]))
def test_the_seed_draws_the_split(held_out: Any) -> None:
    """Another seed holds out other questions; the same seed the same ones."""
    records = [Record(f"question {n}", "1") for n in range(50)]
    drawn = [[r.question for r in split(records, None, _job(held_out=held_out, seed=seed)).held_out] for seed in (1, 1, 2)]
    assert len(drawn[0]) == 10
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("held_out", [{"fold": 0, "of": 5}, {"fold": 6, "of": 5}, {"fold": 1, "of": 1}, {"fold": 1}, {"of": 2}, 1.5, "1/5"])
def test_folds_are_strict(held_out: object) -> None:
    """A fold that does not exist, half a fold and other types are no job."""
    with pytest.raises(msgspec.ValidationError, match="held_out"):
        _job(held_out=held_out)
