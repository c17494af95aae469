"""What NLFT gains where correct outputs are scarce comes from its repairs, and the turning point makes most of them succeed.

No standard answers in the target, so that the wrong outputs must carry the gain. The unseen domain "reversed": the model is sure of its
mistakes, and right in half of the questions.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from tiny_training import tiny_completion

from edge_agent.dataset import Record, is_correct
from edge_agent.demo.problems import problems
from edge_agent.job import Evaluation, Lora, NlftOptions, Schedule
from edge_agent.prompts import PROMPTS
from edge_agent.training.completion import Completion, judge_outputs, sample_outputs
from edge_agent.training.contexts import encode_target
from edge_agent.training.evaluate import evaluate
from edge_agent.training.head import AnswerScores
from edge_agent.training.loop import Training, optimize
from edge_agent.training.methods.nlft import Nlft
from edge_agent.training.repair import Turn, repair_outputs, turning_point
from edge_agent.training.scoring import weigh
from edge_agent.training.weighted import Weighted
from edge_agent.verify import numeric_match
from profiles.device import device_profile
from quantization.adapter import attach_adapter
from quantization.load import load_model, load_tokenizer
from quantization.model_files import find_model
from quantization.plan import Plan

SEED = 3
VERDICT = partial(is_correct, verifier=numeric_match)
FLOOR = 0.6
SCHEDULE = Schedule(updates=80, learning_rate=1e-3, checkpoint_s=3600)
TURN = partial(turning_point, ratio=0.1)
METHOD = Nlft(NlftOptions(standard_answers=False))


def _silent(*_: object) -> None:
    pass


def _anywhere(scores: AnswerScores) -> int:
    return random.Random(len(scores.logp_N)).randrange(len(scores.logp_N))


def _nowhere(scores: AnswerScores) -> None:
    return None


@pytest.fixture(scope="module")
def completion(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Completion:
    return tiny_completion(tiny_model, tmp_path_factory.mktemp("completion"), batch=64)


def _records(completion: Completion) -> list[Record]:
    """50 questions with the model's own outputs."""
    bare = [Record(p.question, p.answer, id=str(i)) for i, p in enumerate(islice(problems("reversed", SEED), 50))]
    return sample_outputs(completion, bare)[0]


def _accuracy(records: list[Record], tiny_model: Path, directory: Path) -> float:
    """Accuracy on 200 held-out questions after training on the records."""
    files = find_model(str(tiny_model))
    tokenizer, model = load_tokenizer(files), load_model(files, device_profile("cpu"))
    model = attach_adapter(model, Lora(), SEED, "tiny")
    samples = [encode_target(tokenizer, PROMPTS["worked"], t, 2048) for t in METHOD.targets(records, VERDICT)]
    plan = Plan("test", 8, 256, False, 64, 0, ())
    training = Training("key", SCHEDULE, SEED, plan, tokenizer, directory, METHOD, numeric_match, 120)
    _, weights = weigh(model, METHOD, samples, plan, tokenizer.pad_token_id, _silent)
    optimize(model, Weighted(model, samples, weights, training), training, _silent)
    questions = [Record(p.question, p.answer) for p in islice(problems("reversed", 1000 + SEED), 200)]
    options = Evaluation(max_new_tokens=120)
    answers = evaluate(model, tokenizer, questions, PROMPTS["worked"], options, batch=100, context_tokens=2048, progress=_silent)
    return sum(a.share for a in answers) / len(answers)


@pytest.mark.parametrize(("turn", "learns"), [(TURN, True), (_nowhere, False)])
def test_accuracy_needs_the_repairs(turn: Turn, learns: bool, completion: Completion, tiny_model: Path, tmp_path: Path) -> None:
    """With its wrong outputs repaired the model passes the floor; with the same outputs judged, by its token weights alone, it does not."""
    here = replace(completion, directory=tmp_path)
    repaired, counts, _ = repair_outputs(here, _records(here), turn, 16, 256)
    judged, judgments, _ = judge_outputs(here, repaired)
    assert judgments.critic == counts.wrong - counts.repaired
    accuracy = _accuracy(judged, tiny_model, tmp_path)
    assert (accuracy >= FLOOR) == learns, f"{accuracy:.3f}, {counts}"


def test_more_repairs_succeed_at_the_turning_point_than_at_random_tokens(completion: Completion, tmp_path: Path) -> None:
    """Cut before the mistake needlessly or after it, a third of the outputs stays wrong; at the turning point hardly any."""
    here = replace(completion, directory=tmp_path)
    records = _records(here)
    shares = []
    for name, turn in (("turning", TURN), ("random", _anywhere)):
        (tmp_path / name).mkdir()
        counts = repair_outputs(replace(here, directory=tmp_path / name), records, turn, 16, 256)[1]
        shares.append(counts.repaired / counts.wrong)
    assert shares[0] > 0.9
    assert shares[1] < 0.8
