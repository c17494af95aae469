"""`edge-agent dataset build`: a dataset of questions and standard answers, completed with the model's own outputs and judgments.

What has been done stands in a directory beside the dataset to write, and the same command goes on from it, however it was ended.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from edge_agent.answers import check_answers
from edge_agent.config import Endpoint
from edge_agent.dataset import Record, Verify, file_sha256, is_correct, read_records, write_records
from edge_agent.errors import BuildConflict, Busy, DirectoryUnusable
from edge_agent.files import lock_file, write_file
from edge_agent.job import Sampling, Sha256, Strict
from edge_agent.job_building import BuildOptions
from edge_agent.prompts import PROMPTS
from edge_agent.report import Built, Judgments
from edge_agent.splitting import same_question
from edge_agent.training.completion import Completion, draw, find_endpoint, judge_outputs, output_room, sample_outputs
from edge_agent.training.methods.method import Context
from edge_agent.training.prepare import usable_profile
from edge_agent.training.reporter import Listener, Reporter, memory_explained
from edge_agent.verify import find_verifier
from profiles.memory import fix_malloc
from quantization.cache import find_cache
from quantization.load import load_model, load_tokenizer
from quantization.model_files import find_model

CONTEXTS: tuple[Context, ...] = ("standard", "judge")
"""Any method may train on the dataset, so outputs leave room for all contexts."""
NAMED = 5
"""Records that a problem names."""


class Recipe(Strict, frozen=True, kw_only=True):
    """Everything that determines the dataset that is built: `recipe.json` of its directory."""

    version: Literal[1] = 1
    dataset_sha256: Sha256
    model_fingerprint: Sha256
    options: BuildOptions


def build_dataset(model: str, data: Path, out: Path, options: BuildOptions, listen: Listener, judges: Mapping[str, Endpoint]) -> Built:
    """Complete the records of `data` and write them to `out`; a build that was ended goes on.

    Raises BuildConflict where another build, or another file, stands in its place.
    """
    device = usable_profile(options.device)
    records, files, endpoint = read_records(data), find_model(model), find_endpoint(options.judging, judges)
    evaluation, verifier = options.evaluation, find_verifier(options.evaluation.verifier)
    # Without a verifier nothing tells which outputs are correct, so none are sampled, as in a job.
    sampling = options.sampling if verifier else msgspec.structs.replace(options.sampling, outputs=0)
    check_answers(data.name, [(r.id, r.answer) for r in records], evaluation.verifier)
    verdict = partial(is_correct, verifier=verifier)
    exact = msgspec.structs.replace(options, device=device.torch_device)
    recipe = Recipe(dataset_sha256=file_sha256(data), model_fingerprint=files.fingerprint, options=exact)
    fix_malloc()
    reporter = Reporter(device, listen, lambda: False)
    tokenizer, prompts = load_tokenizer(files), PROMPTS[options.prompts]
    for record in records if sampling.outputs else []:
        if record.output is None:
            output_room(tokenizer, prompts, record, CONTEXTS, files.context_tokens)
    with _taken(out, recipe) as directory, memory_explained(lambda: reporter.recorder.current_stage):
        with reporter.stage("load"):
            loaded = load_model(files, device, cache=find_cache())
        completion = Completion(
            model=loaded, tokenizer=tokenizer, prompts=prompts, sampling=sampling, judging=options.judging,
            endpoint=endpoint, is_correct=verdict, seed=options.seed, context_tokens=files.context_tokens,
            contexts=CONTEXTS, max_new_tokens=evaluation.max_new_tokens, batch=evaluation.batch, directory=directory,
            progress=reporter.progress,
        )  # fmt: skip
        with reporter.stage("sample") as row:
            completed, cut_off, row.resumed = sample_outputs(completion, records)
            drawn = draw(completed, verdict, sampling, options.seed)
        with reporter.stage("judge") as row:
            judged, judgments, row.resumed = judge_outputs(completion, drawn)
        content = write_records(judged)
        _write(out, content)
    correct = sum(verdict(r) for r in judged if r.output is not None)
    return Built(
        file=out.name, sha256=hashlib.sha256(content).hexdigest(), records=len(judged),
        questions=len({same_question(r.question) for r in records}), outputs=sampling.outputs * sum(r.output is None for r in records),
        cut_off=cut_off, distinct=sum(r.output is not None for r in completed), correct=correct,
        incorrect=sum(r.output is not None for r in judged) - correct, judgments=judgments,
        problems=_problems(completed, judged, judgments, verifier, sampling), tokens=sum(r.tokens for r in reporter.recorder.rows),
        seconds=time.monotonic() - reporter.started, resumed=any(r.resumed for r in reporter.recorder.rows),
    )  # fmt: skip


@contextmanager
def _taken(out: Path, recipe: Recipe) -> Iterator[Path]:
    """Hold the directory of a build for this process. Raises BuildConflict, Busy or DirectoryUnusable."""
    directory = out.with_name(f"{out.name}.build")
    file, wanted = directory / "recipe.json", msgspec.json.format(msgspec.json.encode(recipe)) + b"\n"
    if out.exists() and not file.exists():
        raise BuildConflict(out, "is there already, and is of no build that could go on")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = lock_file(directory / ".lock")
    except OSError as error:
        raise DirectoryUnusable(directory, error.strerror or type(error).__name__) from None
    if lock is None:
        raise Busy(directory)
    with lock:
        if not file.exists():
            write_file(file, wanted)
        elif file.read_bytes() != wanted:
            raise BuildConflict(directory, "is of a build with another model, data or options")
        yield directory


def _write(out: Path, content: bytes) -> None:
    """Write the dataset where nothing else stands."""
    if not out.exists():
        write_file(out, content)
    elif out.read_bytes() != content:
        raise BuildConflict(out, "has been changed since it was built")


def _problems(
    completed: list[Record], judged: list[Record], judgments: Judgments, verifier: Verify | None, sampling: Sampling
) -> list[str]:
    """Name what is not as it was asked for."""
    problems = []
    if verifier is None:
        problems.append("the verifier 'none' tells no correct outputs: none were sampled, and those given are correct unless judged")
    if silent := [str(r.id) for r in completed if r.output is None]:
        problems.append(f"{len(silent):,} records have no output that is not blank ({_some(silent)})")
    verdicts = {is_correct(r, verifier) for r in completed if r.output is not None}
    if sampling.correct_share not in (None, 0.0, 1.0) and len(verdicts) == 1:
        problems.append(f"all outputs are {'correct' if verdicts.pop() else 'incorrect'}: correct_share could not be drawn, all are kept")
    if bare := sum(r.output is None for r in judged) - len(silent):
        problems.append(f"{bare:,} questions lost all their outputs in the draw, and are kept without")
    if judgments.stopped:
        problems.append(f"{judgments.stopped}; the critic judged the rest")
    return problems


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
