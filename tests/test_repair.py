"""Repairs of wrong outputs: where they turn, what is put there, and what does not count as a repair."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import msgspec
import pytest
import torch
from tiny_training import tiny_completion

from edge_agent.dataset import Record
from edge_agent.demo.problems import judged_mistake, problems
from edge_agent.training.completion import Completion
from edge_agent.training.contexts import encode_target, record_ids
from edge_agent.training.head import AnswerScores
from edge_agent.training.methods.method import Target
from edge_agent.training.repair import repair_outputs, standard_scores, turning_point

RATIO = 0.1
TURN = partial(turning_point, ratio=RATIO)


@pytest.fixture(scope="module")
def completion(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Completion:
    return tiny_completion(tiny_model, tmp_path_factory.mktemp("completion"), batch=16)


@pytest.fixture(scope="module")
def mistakes() -> list[Record]:
    """Wrong outputs of problems that the tiny model knows, by a program that makes one mistake in each."""
    rng = random.Random(5)
    return [Record(p.question, p.answer, judged_mistake(p, rng)[0], id=f"m{n}") for n, p in enumerate(islice(problems("seen", 9), 24))]


def test_turning_point_is_the_first_refuted_token_however_sure_the_model_was() -> None:
    """A token turns where the standard context gives it less than the ratio of its best token there; later ones do not count."""
    logp = torch.tensor([0.5, 0.06, 0.04, 1e-6]).log()
    best = torch.tensor([0.5, 0.5, 0.5, 0.99]).log()
    assert turning_point(AnswerScores(logp, best, torch.zeros(4)), RATIO) == 2
    assert turning_point(AnswerScores(logp, best, torch.zeros(4)), 1e-5) == 3
    assert turning_point(AnswerScores(best, best, torch.zeros(4)), RATIO) is None


def test_repairs_keep_the_output_up_to_its_turning_point(completion: Completion, mistakes: list[Record], tmp_path: Path) -> None:
    """Most mistakes are repaired: verified, without a judgment, the same up to the turning point and different there."""
    records, repairs, _ = repair_outputs(replace(completion, directory=tmp_path), mistakes, TURN, 8, 256)
    repaired = {r.id.removesuffix("/repaired"): r for r in records if r.id.endswith("/repaired")}
    assert repairs.wrong == 24
    assert repairs.repaired >= len(repaired) >= 18
    targets = [Target(r, r.output, "incorrect", ("standard",)) for r in mistakes]
    samples = [encode_target(completion.tokenizer, completion.prompts, t, completion.context_tokens) for t in targets]
    late = 0
    for mistake, sample, scores in zip(mistakes, samples, standard_scores(completion, samples, 8, 256), strict=True):
        if mistake.id in repaired:
            record, at = repaired[mistake.id], TURN(scores)
            assert completion.is_correct(record)
            assert record.judgment is None
            kept = completion.tokenizer.decode(sample.answer[:at])
            assert record.output.startswith(kept)
            assert not record.output.startswith(completion.tokenizer.decode(sample.answer[: at + 1]))
            late += "<<" in kept
    assert late > 5, "hardly a mistake came after something that was right: the test shows little"


@pytest.mark.slow
def test_an_interrupted_repair_goes_on(completion: Completion, mistakes: list[Record], tmp_path: Path) -> None:
    """What an earlier run has written is taken from its journal; what was written for other outputs is not."""
    here = replace(completion, directory=tmp_path, batch=8)
    whole = repair_outputs(here, mistakes, TURN, 8, 256)
    assert not whole[2]
    file = tmp_path / "repairs.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:1]) + lines[1][:20])
    resumed = repair_outputs(here, mistakes, TURN, 8, 256)
    assert resumed == (whole[0], whole[1], True)
    assert file.read_bytes().splitlines(keepends=True) == lines
    other = repair_outputs(here, mistakes[:12], TURN, 8, 256)
    assert other[:2] == repair_outputs(replace(here, directory=tmp_path.parent), mistakes[:12], TURN, 8, 256)[:2]


def test_one_output_without_room_leaves_the_others_theirs(completion: Completion, mistakes: list[Record], tmp_path: Path) -> None:
    """In a context that is too tight for one of the outputs the others are repaired all the same, and all of them fit."""
    standard = [len(record_ids(completion.tokenizer, completion.prompts, r, "standard")) for r in mistakes[:8]]
    outputs = [len(completion.tokenizer(r.output)["input_ids"]) for r in mistakes[:8]]
    long = replace_output(mistakes[0], "\n".join([*mistakes[0].output.splitlines()[:-1], *["Ana has <<1+1=2>>2 apples."] * 40, "#### 2"]))
    tight = max(a + b for a, b in zip(standard, outputs, strict=True)) + 450
    here = replace(completion, directory=tmp_path, context_tokens=tight)
    _, repairs, _ = repair_outputs(here, [*mistakes[:8], long], TURN, 8, 256)
    alone = repair_outputs(replace(here, directory=tmp_path.parent), mistakes[:8], TURN, 8, 256)[1]
    assert alone.repaired >= 6
    assert repairs.repaired >= alone.repaired


def test_records_that_differ_in_more_than_their_text_are_all_kept(completion: Completion, mistakes: list[Record], tmp_path: Path) -> None:
    """The same wrong output under two instructions gives two repairs; twice the same record gives one."""
    first = mistakes[1]
    twice = [first, msgspec.structs.replace(first, instruction="Solve it."), msgspec.structs.replace(first, id="again")]
    records, repairs, _ = repair_outputs(replace(completion, directory=tmp_path), twice, TURN, 8, 256)
    assert [r.instruction for r in records] == [None, "Solve it."]
    assert repairs.repaired == 3


def replace_output(record: Record, output: str) -> Record:
    return msgspec.structs.replace(record, output=output, id="long")


def test_another_final_answer_after_the_same_working_is_no_repair(completion: Completion, tmp_path: Path) -> None:
    """An output whose working is right and whose last line is wrong stays wrong: the standard answer's number must not be pasted in."""
    problem = next(p for p in problems("seen", 11) if len(p.steps) == 2)
    wrong = problem.answer.rpartition("\n")[0] + "\n#### 199"
    given = [Record(problem.question, problem.answer, wrong, "Wrong.", "a")]
    records, repairs, _ = repair_outputs(replace(completion, directory=tmp_path), given, TURN, 8, 256)
    assert repairs.repaired == 0
    assert records[0].output == wrong
    assert records[0].judgment == "Wrong."


def test_records_that_cannot_be_repaired_pass_unchanged(completion: Completion, mistakes: list[Record], tmp_path: Path) -> None:
    """Correct outputs, records without outputs, and judged outputs without a standard answer stay what they are."""
    right = Record(mistakes[0].question, mistakes[0].answer, mistakes[0].answer, id="right")
    records = [right, Record("How many?", "#### 1", id="bare"), Record("Say it.", None, "No.", "Rude.", "free")]
    assert repair_outputs(replace(completion, directory=tmp_path), records, TURN, 8, 256)[0] == records
