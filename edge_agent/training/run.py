"""The main path: one job, from its directory to its result."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from edge_agent.answers import Answer, accept, examples, measure
from edge_agent.config import Endpoint
from edge_agent.dataset import Record
from edge_agent.errors import (
    NO_SPACE,
    Conflict,
    DatasetEmpty,
    DiskFull,
    DoesNotFit,
    EdgeAgentError,
    OutOfMemory,
    Stopped,
    describe_unexpected,
)
from edge_agent.files import write_file
from edge_agent.job import Job, NlftOptions
from edge_agent.job_directory import JobDirectory
from edge_agent.report import Adapter, Event, Failure, Judgments, Model, Repairs, Result
from edge_agent.training import outcome
from edge_agent.training.completion import Completion, draw, find_endpoint, judge_outputs, sample_outputs
from edge_agent.training.contexts import Sample, encode_target
from edge_agent.training.enforce import capped, persevere
from edge_agent.training.evaluate import evaluate
from edge_agent.training.live_options import LiveOptions
from edge_agent.training.loop import Training, optimize, total_updates
from edge_agent.training.objectives import OBJECTIVES
from edge_agent.training.packing import reads_trees
from edge_agent.training.prepare import NO_TARGETS, Prepared, admit, learn_overhead, prepare, usable_profile
from edge_agent.training.repair import repair_outputs, turning_point
from edge_agent.training.reporter import Listener, Reporter, Stopping, out_of_memory
from edge_agent.training.saliency_scores import LiveMap, SaliencyParts
from edge_agent.training.scores_file import Scored, load_scores, save_scores
from edge_agent.training.scoring import unheard, weigh
from edge_agent.training.trace import traced
from edge_agent.training.weighted import Weighted
from profiles.device import detect_profile, device_name
from profiles.energy import find_meter
from profiles.gpu_lock import hold_gpu
from profiles.host import HERE, Machine
from profiles.memory import fix_malloc, keep_freed
from profiles.pressure import Pressure
from profiles.sampler import sampled
from quantization.adapter import WEIGHTS, attach_adapter, save_adapter
from quantization.cache import find_cache
from quantization.load import load_model
from quantization.nf4 import kernel_of
from quantization.plan import Plan

T = TypeVar("T")


def run_job(
    directory: JobDirectory, listen: Listener, expected: Job | None = None, stopping: Stopping = lambda: False,
    judges: Mapping[str, Endpoint] = MappingProxyType({}), trace: bool = False, machine: Machine = HERE,
    resting: Callable[[], bool] = lambda: False, ran_s: float = 0.0, holds_gpu: bool = False,
) -> Result:  # fmt: skip
    """Run the job of a directory to its result; a finished job returns its result, an interrupted one goes on.

    `expected` is the job that the directory must hold; `stopping` is asked at every step whether to checkpoint and stop; `judges` are
    the endpoints that the job may name; `trace` has some updates recorded for PyTorch's viewers; `machine` is where it is read what
    memory others need; `resting` is asked at every step whether to wait in place; `ran_s` of the job's `max_run_s` are spent already;
    with `holds_gpu` this process has been given the lock of the GPU, which else is taken here.
    Raises an EdgeAgentError; once the run has begun, the same stands in events.jsonl, and in result.json if the job
    has failed.
    """
    with directory.locked():
        job = directory.read_job()
        if expected not in (None, job):
            raise Conflict(directory.path, "model, data or options")
        earlier = directory.read_result()
        if earlier and earlier.adapter and earlier.job == job.digest and directory.has_adapter(earlier.adapter.sha256):
            return earlier
        device = usable_profile(job.device)
        tell, pressure = _both(directory.append_event, listen), Pressure(device, machine)
        reporter = Reporter(device, tell, stopping, job.max_run_s, job.budget_bytes, find_meter(device), pressure.crowded, resting, ran_s)
        # Attempts after the first know what was rehearsed before them.
        stages = partial(_stages, directory, job, cache(partial(prepare, directory, job)), reporter, judges, trace, machine)
        held = None if holds_gpu else hold_gpu(device)
        with held or nullcontext(), sampled(reporter.recorder, device, directory.profile), capped(device, job.budget_bytes, reporter):
            try:
                result = persevere(stages, directory, reporter, pressure)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # libraries in Rust panic by one that is no Exception
                raise _failed(directory, job, reporter, error) from error
        reporter.emit("finished", seconds=result.seconds)
        return result


def _both(first: Listener, second: Listener) -> Listener:
    def tell(event: Event) -> None:
        first(event)
        second(event)

    return tell


def _stages(
    directory: JobDirectory, job: Job, prepared: Callable[[], Prepared], reporter: Reporter, judges: Mapping[str, Endpoint], trace: bool,
    machine: Machine,
) -> Result:  # fmt: skip
    fix_malloc()
    with reporter.stage("plan"):
        work = prepared()
        endpoint = find_endpoint(job.judging, judges)
        plan = _plan(directory, work, reporter)
        admit(work, plan, directory, reporter.recorder.memory.current_bytes(), machine)
        directory.begin(work.key)
        directory.write_plan(plan)
    model, plan = _load(directory, work, plan, reporter)
    with reporter.stage("evaluate") as row:
        before, row.resumed = _kept(directory, "before.jsonl", Answer, lambda: _evaluate(model, work, plan, reporter))
    completion = _completion(model, work, plan, endpoint, directory, reporter)
    records, cut_off, repairs, judgments = _complete(completion, work, plan, reporter)
    directory.write_rows("records.jsonl", records)
    with reporter.stage("encode") as row:
        samples, development = _encode(work, records)
        row.tokens = sum(len(p) + len(s.answer) for s in samples for p in s.prompts.values())
    model, key = attach_adapter(model, job.lora, job.seed, job.model), _key(job, work, samples)
    epochs = -(-total_updates(job.schedule, len(samples)) * job.schedule.batch // len(samples))
    saliency = SaliencyParts(directory.path, samples, job.method, epochs) if isinstance(job.method, NlftOptions) else None
    with reporter.stage("score") as row:
        (scores, weights), row.resumed = _score(directory, model, work, samples, plan, reporter, key, saliency)
    live = LiveOptions(directory, job.method, reporter.emit)
    with reporter.stage("train") as row:
        training = Training(
            key, job.schedule, job.seed, plan, work.tokenizer, directory.path, work.method, work.verifier,
            job.evaluation.max_new_tokens, work.files.context_tokens, development,
            newer=live.newer, taken=live.taken,
        )  # fmt: skip
        if saliency:
            written = LiveMap(directory, saliency, lambda: saliency.file(work.tokenizer, scores, weights), reporter.emit)
            training = replace(training, rescored=saliency.rescorings.add, scores=scores, look=written.look)
        objective = OBJECTIVES.get(type(job.method), Weighted)(model, samples, weights, training)
        with traced(directory, reporter.progress) if trace else nullcontext(reporter.progress) as progress:
            state, row.resumed = optimize(model, objective, training, progress)
    with reporter.stage("evaluate"):
        after = _evaluate(model, work, plan, reporter)
        directory.write_rows("after.jsonl", after)
    with reporter.stage("save"):
        sha256 = save_adapter(model, directory.adapter, job.model)
        if saliency:
            write_file(directory.saliency, saliency.file(work.tokenizer, scores, weights), private=True)
            directory.saliency_wanted.unlink(missing_ok=True)
    measured = measure(before, after)
    accepted, acceptance = accept(measured, job.evaluation.accept_if)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = msgspec.structs.replace(
        _result(job, reporter, "succeeded", len(records)),
        model=Model(job.model, work.files.fingerprint, work.files.context_tokens),
        data=outcome.describe_data(
            job.dataset.sha256, records, cut_off, repairs, judgments, len(work.held_out), samples, weights, work.is_correct
        ),
        plan=plan, misses=directory.read_misses(work.key), kernel=kernel_of(model), updates=state.updates, losses=list(state.losses),
        changes=list(state.changes), kept_update=state.kept or state.updates, development_losses=list(state.development),
        accuracy=measured, accepted=accepted, acceptance=acceptance,
        examples=examples(before, after),
        adapter=Adapter(sha256, (directory.adapter / WEIGHTS).stat().st_size, trained),
    )  # fmt: skip
    directory.write_result(result)
    if not plan.keeps_freed:
        learn_overhead(work.device, plan, result.stages)
    directory.forget_parts()
    return result


def _plan(directory: JobDirectory, work: Prepared, reporter: Reporter, padded: bool = False) -> Plan:
    """Return the plan that the job has begun with, or a new one that takes less than those that did not hold.

    Raises DoesNotFit, or OutOfMemory where no lower rung is left.
    """
    misses = directory.read_misses(work.key)
    missed: dict[str, int] = {m.stage: min(n.planned_bytes for n in misses if n.stage == m.stage) for m in misses}
    plan = None if padded else directory.read_plan(work.key)
    try:
        reporter.plan = plan = plan or work.plan(padded, missed, reporter.check)
    except DoesNotFit as error:
        if not misses:
            raise
        raise OutOfMemory(misses[-1].stage, f"{misses[-1].text}; no smaller settings are left") from error
    return plan


def _load(directory: JobDirectory, work: Prepared, plan: Plan, reporter: Reporter) -> tuple[Any, Plan]:
    """Return the model and its plan: another one where the model says that it can share beginnings and its own check finds otherwise."""

    def load(plan: Plan) -> Any:
        with reporter.stage("load"):
            return load_model(work.files, work.device, cache=find_cache(), **plan.vocabulary)

    model, planned = load(plan), plan
    if plan.rows == "shared" and not reads_trees(model):
        plan = _plan(directory, work, reporter, padded=True)
        directory.write_plan(plan)
        if plan.vocabulary != planned.vocabulary:
            del model
            model = load(plan)
    if plan.keeps_freed:
        keep_freed()
    return model, plan


def _score(
    directory: JobDirectory, model: Any, work: Prepared, samples: list[Sample], plan: Plan, reporter: Reporter, key: str,
    saliency: SaliencyParts | None,
) -> tuple[Scored, bool]:  # fmt: skip
    """Return scores and weights, and whether an earlier run has taken them; a vocabulary that is held otherwise gives other ones."""
    key = f"{key} {plan.vocabulary}"
    scored = load_scores(directory.path, key, len(samples))
    if scored is not None:
        return scored, True
    on_hidden = saliency.products.add if saliency else unheard
    scored = weigh(model, work.method, samples, plan, work.tokenizer.pad_token_id, reporter.progress, on_hidden=on_hidden)
    if saliency:
        saliency.products.flush()
    save_scores(directory.path, key, scored)
    return scored, False


def _complete(c: Completion, work: Prepared, plan: Plan, reporter: Reporter) -> tuple[list[Record], int, Repairs, Judgments]:
    """Give the records what the method trains on: outputs, repaired where they are wrong, and judgments of what stays wrong.

    Returned with them: how many sampled outputs were cut off, what became of the wrong ones, and who judged.
    """
    records, cut_off, repairs, judgments = work.training, 0, Repairs(), Judgments()
    with reporter.stage("sample") as row:
        if work.samples_outputs:
            records, cut_off, row.resumed = sample_outputs(c, records)
    with reporter.stage("repair") as row:
        if work.repairs_outputs and (ratio := work.method.turning_ratio):
            turn = partial(turning_point, ratio=ratio)
            records, repairs, row.resumed = repair_outputs(c, records, turn, 2 * plan.micro_batch, plan.head_chunk)
        records = draw(records, c.is_correct, c.sampling, c.seed)
    with reporter.stage("judge") as row:
        if "judge" in work.method.contexts:
            records, judgments, row.resumed = judge_outputs(c, records)
    return records, cut_off, repairs, judgments


def _encode(work: Prepared, records: list[Record]) -> tuple[list[Sample], list[Sample]]:
    """Return the samples to train on, and those of the development questions. Raises DatasetEmpty."""
    targets = work.method.targets(records, work.is_correct)
    if not targets:
        raise DatasetEmpty("dataset.jsonl", NO_TARGETS)
    training, development = (
        [encode_target(work.tokenizer, work.prompts, t, work.files.context_tokens) for t in chosen]
        for chosen in (targets, work.development_targets)
    )
    return training, development


def _kept(directory: JobDirectory, name: str, kind: type[T], make: Callable[[], list[T]]) -> tuple[list[T], bool]:
    """Return the rows of an earlier run of this job and True, or make and keep them and return them with False."""
    rows = directory.read_rows(name, kind)
    if rows is not None:
        return rows, True
    rows = make()
    directory.write_rows(name, rows)
    return rows, False


def _evaluate(model: Any, work: Prepared, plan: Plan, reporter: Reporter) -> list[Answer]:
    return evaluate(
        model, work.tokenizer, work.held_out, work.prompts, work.job.evaluation,
        batch=plan.generate_batch, context_tokens=work.files.context_tokens, progress=reporter.progress, seed=work.job.seed,
        rows=2 * plan.micro_batch, chunk=plan.head_chunk,
    )  # fmt: skip


def _completion(
    model: Any, work: Prepared, plan: Plan, endpoint: Endpoint | None, directory: JobDirectory, reporter: Reporter
) -> Completion:
    return Completion(
        model=model, tokenizer=work.tokenizer, prompts=work.prompts, sampling=work.job.sampling, judging=work.job.judging,
        endpoint=endpoint, is_correct=work.is_correct, seed=work.job.seed, context_tokens=work.files.context_tokens,
        contexts=work.method.contexts, max_new_tokens=work.job.evaluation.max_new_tokens, batch=plan.generate_batch,
        directory=directory.path, progress=reporter.progress,
    )  # fmt: skip


def _key(job: Job, work: Prepared, samples: list[Sample]) -> str:
    """Identify job, model and samples, so that a checkpoint of anything else is not taken up."""
    ids = msgspec.json.encode([(s.prompts, s.answer) for s in samples])
    return hashlib.sha256(f"{job.digest} {work.files.fingerprint} ".encode() + ids).hexdigest()


def _result(job: Job, reporter: Reporter, state: Any, records: int = 0) -> Result:
    rows = reporter.recorder.rows
    train_row = next((r for r in reversed(rows) if r.stage == "train"), None)
    return Result(
        job=job.digest, state=state, method=str(job.method.__struct_config__.tag), seed=job.seed,
        device=device_name(detect_profile(job.device).torch_device), versions=outcome.versions(), budget_bytes=job.budget_bytes,
        peak_bytes=max((r.peak_bytes for r in rows), default=0), stages=rows, seconds=time.monotonic() - reporter.started,
        tokens_per_s=train_row.tokens_per_s if train_row else None,
        energy=outcome.describe_energy(rows, reporter.recorder.meter.source, records), resumed=any(r.resumed for r in rows),
    )  # fmt: skip


def _failed(directory: JobDirectory, job: Job, reporter: Reporter, error: BaseException) -> BaseException:
    """Record a failure as well as the disk allows, and return the error to raise."""
    stage = reporter.recorder.current_stage
    error = out_of_memory(stage, error) or error
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        error = DiskFull(str(directory.path))
    elif isinstance(error, Stopped):
        reporter.emit("stopped", stage=stage)
        return error
    code, text = (error.code, str(error)) if isinstance(error, EdgeAgentError) else (EdgeAgentError.code, describe_unexpected(error))
    with suppress(OSError, EdgeAgentError):
        reporter.emit("failed", stage=stage, code=code, text=text[:1024])
        directory.write_result(msgspec.structs.replace(_result(job, reporter, "failed"), error=Failure(code, text[:1024])))
    return error
