"""Measures a model with or without an adapter, outside a job."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from edge_agent.answers import Answer, accuracy, check_answers, cut_off, free_text, pass_at
from edge_agent.dataset import Record
from edge_agent.errors import JobSchema
from edge_agent.hints import explain
from edge_agent.job import Evaluation
from edge_agent.job_directory import JobDirectory
from edge_agent.prompts import PROMPTS, Prompts
from edge_agent.report import Accuracy, FreeText, PassAtK
from edge_agent.splitting import measurable
from edge_agent.training.evaluate import evaluate
from edge_agent.training.prepare import prepare, usable_profile
from edge_agent.training.reporter import memory_explained
from quantization.adapter import load_adapter
from quantization.cache import find_cache
from quantization.load import load_model, load_tokenizer
from quantization.model_files import find_model


class Measurement(msgspec.Struct, frozen=True):
    """What `edge-agent evaluate` measured."""

    accuracy: Accuracy | None
    pass_at: list[PassAtK]
    text: FreeText | None
    cut_off: int
    """Outputs that had not ended at `max_new_tokens`."""
    tokens: int
    seconds: float
    answers: list[Answer]


def measure_job(directory: JobDirectory) -> Measurement:
    """Measure the adapter of a finished job again, on its held-out questions and in the same batches."""
    job, result = directory.read_job(), directory.read_result()
    if result is None or result.plan is None or result.state != "succeeded":
        raise JobSchema(str(directory.result_file), "the job has not succeeded; run `edge-agent train` on its directory first")
    work, plan = prepare(directory, job), result.plan
    settings = {"batch": plan.generate_batch, "rows": 2 * plan.micro_batch, "chunk": plan.head_chunk, "seed": job.seed}
    return _measure(job.model, job.device, directory.adapter, work.held_out, work.prompts, job.evaluation, settings, plan.vocabulary)


def measure_files(
    model: str, records: list[Record], adapter: Path | None, prompts: str, options: Mapping[str, Any], seed: int, device: str
) -> Measurement:
    """Measure a model on the questions of a dataset. Raises JobSchema where an option is not valid."""
    if prompts not in PROMPTS:
        raise JobSchema("--prompts", f"there is no set {prompts!r}; choose of {', '.join(PROMPTS)}")
    try:
        evaluation = msgspec.convert(dict(options), type=Evaluation)
    except msgspec.ValidationError as error:
        raise JobSchema("options", explain(error, Evaluation)) from None
    held_out = measurable(records)[: evaluation.questions]
    check_answers("evaluation questions", [(r.id, r.reference) for r in held_out], evaluation.verifier)
    settings = {"batch": evaluation.batch, "seed": seed}
    return _measure(model, device, adapter, held_out, PROMPTS[prompts], evaluation, settings)


def _measure(
    name: str, device: str, adapter: Path | None, held_out: list[Record], prompts: Prompts, evaluation: Evaluation,
    settings: dict[str, int], vocabulary: Mapping[str, bool] = MappingProxyType({}),
) -> Measurement:  # fmt: skip
    files = find_model(name)
    with memory_explained(lambda: "evaluate"):
        tokenizer, model = load_tokenizer(files), load_model(files, usable_profile(device), cache=find_cache(), **vocabulary)
        if adapter is not None:
            model = load_adapter(model, adapter)
        started = time.monotonic()
        answers = evaluate(
            model, tokenizer, held_out, prompts, evaluation, context_tokens=files.context_tokens, progress=lambda *_: None, **settings
        )
        seconds = time.monotonic() - started
    return Measurement(
        accuracy(answers), pass_at(answers), free_text(answers), cut_off(answers), sum(a.tokens for a in answers), seconds, answers
    )
