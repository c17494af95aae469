"""What is settled before a model is loaded: the records, the model's files, the longest sequences, and the plan of bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import takewhile
from typing import Any

import torch
from msgspec.structs import replace

from edge_agent.answers import check_answers
from edge_agent.dataset import Record, Verify, is_correct
from edge_agent.errors import DatasetEmpty, DeviceMissing, DeviceTooSmall, DiskFull, JobSchema, NoRoom, RecordTooLong
from edge_agent.job import Job
from edge_agent.job_directory import JobDirectory
from edge_agent.prompts import PROMPTS, Prompts
from edge_agent.splitting import split
from edge_agent.training.completion import JUDGMENT_TOKENS, longest_prompt, output_room
from edge_agent.training.contexts import answer_ids, contexts_of, encode_target, prompt_ids, record_ids
from edge_agent.training.methods import METHODS
from edge_agent.training.methods.method import IsCorrect, Method, Target
from edge_agent.training.rehearsal import Rehearsal
from edge_agent.verify import find_verifier
from profiles.calibration import calibrated, learn
from profiles.device import DeviceProfile, detect_profile, free_bytes
from profiles.host import Machine
from profiles.memory import HostMemory
from profiles.recorder import StageRow
from quantization.estimate import MARGIN, Lengths
from quantization.ladder import Rows
from quantization.load import load_tokenizer
from quantization.model_files import ModelFiles, find_model
from quantization.nf4 import Kernel, choose_kernel
from quantization.plan import NONE_MISSED, Missed, Plan, Survey
from quantization.shape import Shape, adapter_elements, read_shape

SPARE_DISK_BYTES = 16 * 2**20
LEAST_ROOM_BYTES = 32 * 2**20
"""For records under a budget that has no room: they are read all the same, because what it lacks is told by the plan of them."""
NO_TARGETS = "gives the method nothing to train on (no answer or output that it uses)"


class _Longest:
    """Keeps the lengths of rows, and what all of them have in common at their beginning."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int]] = []
        self._shared: Sequence[int] | None = None

    def add(self, prompt: Sequence[int], answer: Sequence[int]) -> None:
        self._rows.append((len(prompt) + len(answer), len(answer)))
        if self._shared is None:
            self._shared = prompt
        self._shared = self._shared[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._shared, prompt, strict=False)))]

    @property
    def tokens(self) -> int:
        return sum(tokens for tokens, _ in self._rows)

    @property
    def longest(self) -> int:
        return max((tokens for tokens, _ in self._rows), default=0)

    @property
    def shared(self) -> int:
        """Tokens that all rows begin with, where there are several."""
        return len(self._shared or ()) if len(self._rows) > 1 else 0

    def rows(self, count: int, limit: int) -> Rows:
        """Return the longest rows as they are computed: without the last token, which predicts nothing."""
        tokens = sorted((min(tokens, limit) - 1 for tokens, _ in self._rows), reverse=True)[:count]
        answers = sorted((min(answer, limit) for _, answer in self._rows), reverse=True)[:count]
        return Rows(tuple(tokens), tuple(answers), self.shared)


def _within(limit: int, prompt: int, new: int) -> tuple[int, int]:
    """Return a prompt and what is generated after it, within the model's context."""
    new = min(new, limit)
    return min(prompt, limit - new), new


@dataclass(frozen=True)
class Prepared:
    """A job whose inputs have been read and checked."""

    job: Job
    files: ModelFiles
    tokenizer: Any
    device: DeviceProfile
    training: list[Record]
    development: list[Record]
    held_out: list[Record]
    kernel: Kernel
    """What computes in 4 bits there."""
    _rehearsals: dict[bool, Rehearsal] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def key(self) -> str:
        """Names job and model: what a run leaves in its directory is of use for no other."""
        return f"{self.job.digest} {self.files.fingerprint}"

    @property
    def prompts(self) -> Prompts:
        return PROMPTS[self.job.prompts] if isinstance(self.job.prompts, str) else self.job.prompts

    @property
    def verifier(self) -> Verify | None:
        return find_verifier(self.job.evaluation.verifier)

    @property
    def is_correct(self) -> IsCorrect:
        return partial(is_correct, verifier=self.verifier)

    @property
    def development_targets(self) -> list[Target]:
        """The references of the development questions."""
        first = {(r.instruction, r.question, r.reference): r for r in reversed(self.development)}
        return [Target(r, r.reference, "correct") for r in first.values() if r.reference is not None][::-1]

    @cached_property
    def method(self) -> Method:
        method: Method = METHODS[type(self.job.method)](self.job.method)
        return method

    @cached_property
    def shape(self) -> Shape:
        return read_shape(self.files)

    @property
    def samples_outputs(self) -> bool:
        """True where the method trains on outputs, some record has none, the job lets the model write it, and a verifier judges it."""
        wants = self.method.own_outputs == "before" and self.job.sampling.outputs > 0
        return wants and self.verifier is not None and any(r.output is None for r in self.training)

    @property
    def has_targets(self) -> bool:
        """False where it is certain before anything is sampled that there will be nothing to train on."""
        unjudged = "to be written" if "judge" in self.method.contexts else None
        records = [r if r.output is None or r.answer is None else replace(r, judgment=r.judgment or unjudged) for r in self.training]
        return self.samples_outputs or bool(self.method.targets(records, self.is_correct))

    @property
    def repairs_outputs(self) -> bool:
        """True where the method repairs wrong outputs, a verifier tells them, and there are outputs."""
        some = self.samples_outputs or any(r.output is not None and r.answer is not None for r in self.training)
        return self.method.turning_ratio is not None and self.verifier is not None and some

    @cached_property
    def lengths(self) -> Lengths:
        """Longest sequences of the job: exact for what is given, bounds for outputs still to be written.

        Raises RecordTooLong where a record does not fit the model's context.
        """
        new = self.job.evaluation.max_new_tokens
        self._check_records()
        train, score, asked = _Longest(), _Longest(), _Longest()
        for record in (*self.training, *self.development):
            contexts = tuple(c for c in contexts_of(record) if c in self.method.contexts)
            for text in filter(None, (record.answer, record.output if self.method.own_outputs == "before" else None)):
                sample = encode_target(self.tokenizer, self.prompts, Target(record, text, "correct", contexts), self.files.context_tokens)
                train.add(sample.prompts["base"], sample.answer)
                for ids in sample.prompts.values():
                    score.add(ids, sample.answer)
                asked.add(sample.prompts["base"], ())
        if self.samples_outputs or self.method.own_outputs == "during":
            self._add_unwritten(train, score, new + 1)
        self._add_unjudged(score)
        for record in self.held_out:
            asked.add(self._held_out_ids(record, score), ())
        if self.method.trained_in != ("base",):
            train = score
        repair = (score.longest, new) if self.repairs_outputs else (0, 0)
        generates = self.samples_outputs or self.method.own_outputs == "during" or self.held_out
        batch, limit = self.job.schedule.batch, self.files.context_tokens
        judge = self._judging_tokens
        return Lengths(
            train.rows(batch, limit),
            score.rows(2 * batch, limit),
            _within(limit, asked.longest, new if generates else 0),
            _within(limit, *repair),
            _within(limit, max(0, judge - JUDGMENT_TOKENS), min(judge, JUDGMENT_TOKENS)),
            asked.shared,
            score.tokens,
            sum(r.memory_bytes for r in (*self.training, *self.development, *self.held_out)),
        )

    def _add_unwritten(self, train: _Longest, score: _Longest, tokens: int) -> None:
        """Count the outputs that are still to be written, each as long as it may be."""
        outputs = max(1, self.job.sampling.outputs)
        for record in self.training:
            if record.output is None or self.method.own_outputs == "during":
                base = record_ids(self.tokenizer, self.prompts, record)
                longest = longest_prompt(self.tokenizer, self.prompts, record, self.method.contexts)
                for _ in range(outputs):
                    train.add(base, range(tokens))
                    score.add((*base, *range(-longest + len(base), 0)), range(tokens))
                    for _ in self.method.contexts:
                        score.add((*base, *range(-longest + len(base), 0)), range(tokens))

    def _held_out_ids(self, record: Record, score: _Longest) -> list[int]:
        """Return the prompt of a question to measure on; free text is scored as well. Raises RecordTooLong."""
        ids, limit = record_ids(self.tokenizer, self.prompts, record), self.files.context_tokens
        if len(ids) >= limit:
            raise RecordTooLong("held-out questions", record.id, len(ids) + 1, limit, "question and one token more")
        if self.verifier is None:
            reference = answer_ids(self.tokenizer, record.reference or "")
            if len(ids) + len(reference) > limit:
                raise RecordTooLong("held-out questions", record.id, len(ids) + len(reference), limit, "question with its reference")
            score.add(ids, reference)
        return ids

    def _add_unjudged(self, score: _Longest) -> None:
        """Count the judge contexts of the given outputs whose judgments are still to be written.

        Raises RecordTooLong where one would not fit.
        """
        for record in self.training if "judge" in self.method.contexts else []:
            if record.output and record.answer and not record.judgment and not self.is_correct(record):
                prompt = longest_prompt(self.tokenizer, self.prompts, record, ("judge",))
                answer = answer_ids(self.tokenizer, record.output)
                if prompt + len(answer) > self.files.context_tokens:
                    limit = self.files.context_tokens
                    raise RecordTooLong("dataset.jsonl", record.id, prompt + len(answer), limit, "judge context with its output")
                base = record_ids(self.tokenizer, self.prompts, record)
                score.add((*base, *range(-prompt + len(base), 0)), answer)

    def _check_records(self) -> None:
        """Raise DatasetSchema for an answer that cannot be compared, RecordTooLong where an output to be written has no room."""
        answers = [(r.id, r.answer) for r in (*self.training, *self.development)]
        references = [(r.id, r.reference) for r in self.held_out]
        for file, texts in (("dataset.jsonl", answers), ("held-out questions", references)):
            check_answers(file, texts, self.job.evaluation.verifier)
        for record in self.training:
            if self.samples_outputs and record.output is None:
                output_room(self.tokenizer, self.prompts, record, self.method.contexts, self.files.context_tokens)

    @property
    def _judging_tokens(self) -> int:
        """Longest request for a judgment by the model itself with the judgment; 0 where it writes none."""
        if self.job.judging.source != "model" or "judge" not in self.method.contexts:
            return 0
        longest = JUDGMENT_TOKENS
        for record in self.training:
            if record.answer is None:
                continue
            request = self.prompts.judging_messages(record.question, record.answer, record.output or "")
            unwritten = 0 if record.output else self.job.evaluation.max_new_tokens
            longest = max(longest, len(prompt_ids(self.tokenizer, request)) + unwritten + JUDGMENT_TOKENS)
        return longest

    def rehearsal(self, padded: bool = False, on_run: Callable[[], None] = lambda: None) -> Rehearsal:
        """Return the dry runs of the job, each made once; `padded` where the model turned out to share no beginnings of rows.

        `on_run` is called before each that is made from now on.
        """
        if padded not in self._rehearsals:
            of = (self.files, self.shape, self.job, self.lengths, self.device, self.method)
            self._rehearsals[padded] = Rehearsal(*of, padded, kernel=self.kernel)
        made = self._rehearsals[padded]
        made.on_run = on_run
        return made

    def plan(self, padded: bool = False, missed: Missed = NONE_MISSED, on_run: Callable[[], None] = lambda: None) -> Plan:
        """Return the plan of the job by dry runs; one that lacked memory before has no room to keep what it frees. Raises DoesNotFit."""
        made = self.rehearsal(padded, on_run).plan(missed)
        return made if missed else self._with_room(made)

    def survey(self) -> Survey:
        """Return the plan that a run would begin with, and what else the ladder offers. Raises DoesNotFit or DeviceTooSmall."""
        rehearsal = self.rehearsal()
        made = self._with_room(rehearsal.plan())
        check_device(self.device, made)
        return rehearsal.survey(made)

    def _with_room(self, made: Plan) -> Plan:
        """Return a plan that keeps what it frees where that is of use, and there is room for it now."""
        free = free_bytes(self.device) - self.device.reserve_bytes + HostMemory().current_bytes()
        room_bytes = min(made.budget_bytes - self.device.spare_bytes, free)
        return replace(made, keeps_freed=self.device.kind == "cpu" and made.roomy_bytes <= room_bytes)


def usable_profile(wanted: str) -> DeviceProfile:
    """Return the profile of the device to run on. Raises DeviceMissing where it is not there, or PyTorch cannot use it."""
    device = detect_profile(wanted)
    if device.torch_device == "cuda" and not torch.cuda.is_available():
        raise DeviceMissing("this PyTorch cannot use the GPU that is there")
    return device


def prepare(directory: JobDirectory, job: Job) -> Prepared:
    """Read and check the inputs of a job directory. Raises DatasetTooLarge where they would take much of the budget."""
    left_bytes = job.budget_bytes - HostMemory().current_bytes()
    of_host = detect_profile(job.device).kind != "discrete"
    return prepare_files(job, *directory.read_dataset(job, max(LEAST_ROOM_BYTES, left_bytes // 4) if of_host else None))


def prepare_files(
    job: Job, records: list[Record], evaluation: list[Record] | None, device: DeviceProfile | None = None, *, weights: bool = True
) -> Prepared:
    """Split the records of a job and find its model, to plan it alone also without `weights`; without `device` for this machine."""
    parts = split(records, evaluation, job)
    files = find_model(job.model, weights=weights)
    here, device = device is None, calibrated(device or detect_profile(job.device))
    kernel = choose_kernel(device.torch_device) if here or device.kind == "cpu" else "bitsandbytes"
    prepared = Prepared(job, files, load_tokenizer(files), device, parts.training, parts.development, parts.held_out, kernel)
    if job.schedule.patience and not prepared.development_targets:
        raise JobSchema("schedule.patience", "there is no development question to measure on; set evaluation.development, such as 0.1")
    if job.evaluation.development and job.schedule.patience is None:
        raise JobSchema("evaluation.development", "it decides on early stopping only; set schedule.patience, such as 2, or leave it out")
    if prepared.method.own_outputs == "during" and prepared.verifier is None:
        raise JobSchema("method", "it rewards outputs by a verifier, and the job has none")
    if not prepared.has_targets:
        raise DatasetEmpty("dataset.jsonl", NO_TARGETS)
    return prepared


def check_device(device: DeviceProfile, plan: Plan) -> None:
    """Raise DeviceTooSmall where a device could not take a plan even if nothing else ran on it, as far as its profile says."""
    if device.memory_bytes is not None and plan.peak_bytes > device.memory_bytes - device.reserve_bytes:
        raise DeviceTooSmall(device.title, device.memory_bytes, device.reserve_bytes, plan.peak_bytes)


def admit(prepared: Prepared, plan: Plan, directory: JobDirectory, held_bytes: int, machine: Machine) -> None:
    """Raise DeviceTooSmall, NoRoom or DiskFull where the machine cannot take the job now.

    This process has `held_bytes` of what is planned already.
    """
    check_device(prepared.device, plan)
    free, needed_bytes = free_bytes(prepared.device, machine), plan.peak_bytes - held_bytes + prepared.device.reserve_bytes
    if needed_bytes > free:
        raise NoRoom("device memory", free, needed_bytes)
    # Two checkpoints exist while one replaces the other, then the adapter. A checkpoint has the weights and two moments, with
    # early stopping the best weights, and with ReFT those of the warm-up model.
    needs = adapter_elements(prepared.shape, prepared.job.lora) * 4 * (2 * 5 + 1) + SPARE_DISK_BYTES - directory.made_bytes
    if shutil.disk_usage(directory.path).free < needs:
        raise DiskFull(str(directory.path), needs)


def learn_overhead(device: DeviceProfile, plan: Plan, rows: list[StageRow]) -> None:
    """Remember what each stage would have had to be planned with beyond what was counted for it.

    A stage may have had less to do than the longest that was planned, or nothing; only loading takes what it takes, so no stage counts
    for less than that.
    """
    found: dict[str, int] = {}
    for row in rows:
        if row.planned_bytes and not row.resumed and (row.tokens or row.stage == "load"):
            counted_bytes = int((row.planned_bytes - plan.beyond_bytes(row.stage)) / MARGIN)
            found[row.stage] = max(row.peak_bytes - counted_bytes, found.get(row.stage, found.get("load", 0)))
    learn(device, found)
