"""Measures the shipped tiny model: `python benchmarks/tiny_model.py` writes benchmarks/results/tiny_model.json.

Accuracy on fresh problems of the family that it was trained on and of the three unseen domains, as shipped and in NF4; and
whether it reads its contexts: how much a judgment raises the log-probability of the mistake that it names, and a standard answer
that of a correct output and of a wrong one. Problems come from seeds that training does not use.
"""

from __future__ import annotations

import datetime
import random
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_agent.answers import accuracy as accuracy_of
from edge_agent.dataset import Record
from edge_agent.demo.problems import FAMILIES, judged_mistake, problems
from edge_agent.job import Evaluation
from edge_agent.prompts import PROMPTS
from edge_agent.report import Accuracy
from edge_agent.training.contexts import encode_target
from edge_agent.training.evaluate import evaluate
from edge_agent.training.methods.method import Scores, Target
from edge_agent.training.outcome import versions
from edge_agent.training.scoring import score
from profiles.device import device_name, device_profile
from quantization.load import load_model
from quantization.model_files import find_model

TINY = Path(__file__).parent.parent / "edge_agent" / "demo" / "tiny"
SEED, QUESTIONS, PAIRS = 20_000, 500, 300
RESULTS = Path(__file__).parent / "results" / "tiny_model.json"


def silent(*_: object) -> None:
    pass


def accuracy(model: Any, tokenizer: Any, family: str) -> Accuracy | None:
    records = [Record(p.question, p.answer) for p in islice(problems(family, SEED), QUESTIONS)]
    options = Evaluation(max_new_tokens=120)
    answers = evaluate(model, tokenizer, records, PROMPTS["worked"], options, batch=64, context_tokens=2048, progress=silent)
    return accuracy_of(answers)


def context_use(model: Any, tokenizer: Any, family: str) -> dict[str, float]:
    """Mean differences of log-probability per token."""
    rng = random.Random(SEED)
    drawn = []
    for problem in islice(problems(family, SEED + 1), PAIRS):
        output, judgment = judged_mistake(problem, rng)
        record = Record(problem.question, problem.answer, output, judgment)
        drawn += [Target(record, output, "incorrect", ("standard", "judge")), Target(record, problem.answer, "correct", ("standard",))]
    samples = [encode_target(tokenizer, PROMPTS["worked"], t, 2048) for t in drawn]
    found = dict(score(model, samples, 32, 256, tokenizer.pad_token_id, silent))
    scores = [found[i] for i in range(len(samples))]
    wrong, right = scores[0::2], scores[1::2]

    def mean(parts: list[torch.Tensor | None], bases: list[Scores]) -> float:
        return round(torch.cat([part - s.base_logp_T for part, s in zip(parts, bases, strict=True) if part is not None]).mean().item(), 3)

    return {
        "wrong_output_judge_minus_base": mean([s.judge_logp_T for s in wrong], wrong),
        "wrong_output_standard_minus_base": mean([s.standard_logp_T for s in wrong], wrong),
        "correct_output_standard_minus_base": mean([s.standard_logp_T for s in right], right),
    }


def main() -> None:
    files = find_model(str(TINY))
    tokenizer = AutoTokenizer.from_pretrained(str(TINY))
    plain = AutoModelForCausalLM.from_pretrained(str(TINY), dtype=torch.float32).eval()
    nf4 = load_model(files, device_profile("cpu"))
    report = {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "machine": device_name("cpu"),
        "versions": versions(),
        "parameters": plain.num_parameters(),
        "fingerprint": files.fingerprint,
        "accuracy": {f: {"float32": accuracy(plain, tokenizer, f), "nf4": accuracy(nf4, tokenizer, f)} for f in FAMILIES},
        "context_use": {f: context_use(nf4, tokenizer, f) for f in FAMILIES},
    }
    RESULTS.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
