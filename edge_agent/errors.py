"""The one error tree: each class has a stable wire `code`, an `exit_code`, and a text that says what, where and what to do."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from traceback import walk_tb


def human_bytes(n: float) -> str:
    """`5,912 MiB`, the unit of every size that a person reads."""
    return f"{n / 2**20:,.0f} MiB" if n >= 2**20 else f"{n:,.0f} bytes"


class EdgeAgentError(Exception):
    """Base of all errors that a user can act upon."""

    code = "internal"
    exit_code = 1


PACKAGES = ("edge_agent", "profiles", "quantization")
WHOLE_TEXT = "what it wrote is in trainer.log of the job on its node"


def describe_unexpected(error: BaseException) -> str:
    """Return what may be told anywhere of an error that nobody expected: its type, and the last line of these packages that it passed.

    Its text may quote a dataset and is left out, but for what the system says of a file.
    """
    root = Path(__file__).parent.parent
    files = ((Path(frame.f_code.co_filename), line) for frame, line in walk_tb(error.__traceback__))
    ours = [(file.relative_to(root), line) for file, line in files if file.is_relative_to(root)]
    places = [f" at {file.as_posix()}:{line}" for file, line in ours if file.parts[0] in PACKAGES]
    why = f" ({os.strerror(error.errno)})" if isinstance(error, OSError) and error.errno else ""
    return f"{type(error).__name__}{why}{places[-1] if places else ''}; {WHOLE_TEXT}, or on standard error"


class DatasetSchema(EdgeAgentError):
    """A line of a dataset is no valid record."""

    code = "dataset_schema"
    exit_code = 3

    def __init__(self, file: str, where: str, problem: str) -> None:
        super().__init__(f"{file}, {where}: {problem}; correct or remove it")


class DatasetEmpty(EdgeAgentError):
    """There is nothing to train on, or nothing left after holding out."""

    code = "dataset_empty"
    exit_code = 3

    def __init__(self, file: str, why: str = "has no records") -> None:
        super().__init__(f"{file} {why}; give a dataset with at least one record to train on: docs/dataset.md")


class DatasetTooLarge(EdgeAgentError):
    """A dataset passes a limit."""

    code = "dataset_too_large"
    exit_code = 3

    def __init__(self, file: str, what: str, limit: str) -> None:
        super().__init__(f"{file}: {what} is over the limit of {limit}; split or shorten it")


class DatasetChecksum(EdgeAgentError):
    """The dataset is not the one that the job names."""

    code = "dataset_checksum"
    exit_code = 3

    def __init__(self, file: str, wanted: str, found: str) -> None:
        super().__init__(f"{file} has sha256 {found}, the job names {wanted}; restore the file, or make a new job with --out elsewhere")


class AnswersUnusable(EdgeAgentError):
    """Files of answers cannot be read or compared."""

    code = "answers"
    exit_code = 3

    def __init__(self, where: str, problem: str, hint: str) -> None:
        super().__init__(f"{where} {problem}; {hint}")


class RecordTooLong(EdgeAgentError):
    """A record does not fit the model's context."""

    code = "record_too_long"
    exit_code = 3

    def __init__(self, file: str, record: str | None, tokens: int, limit: int, what: str) -> None:
        super().__init__(
            f"{file}, record {record}: its {what} takes {tokens:,} tokens, the model's context has {limit:,}; "
            f"shorten or remove the record (records are never truncated silently)"
        )


class JobSchema(EdgeAgentError):
    """A job document or option is not valid."""

    code = "job_schema"
    exit_code = 4

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}; see docs/job.md for the fields of a job")


class Conflict(EdgeAgentError):
    """The directory already holds another job."""

    code = "conflict"
    exit_code = 4

    def __init__(self, directory: Path, what: str) -> None:
        super().__init__(
            f"{directory} holds a job with another {what}; give another --out, or run `edge-agent train {directory}` to go on with that job"
        )


class BuildConflict(EdgeAgentError):
    """What stands at the place of a dataset to build is of another build."""

    code = "conflict"
    exit_code = 4

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} {problem}; give another --out, or remove it")


class JobConflict(EdgeAgentError):
    """A job is handed in under the id of another."""

    code = "conflict"
    exit_code = 4

    def __init__(self, job: str, what: str) -> None:
        super().__init__(f"job {job} is there with another {what}; hand this one in under a new id, or with none")


class DirectoryUnusable(EdgeAgentError):
    """What results should go to cannot be written."""

    code = "directory"
    exit_code = 4

    def __init__(self, directory: Path, problem: str) -> None:
        super().__init__(f"{directory} cannot be used ({problem}); give another place")


class SaliencyUnusable(EdgeAgentError):
    """There is no Saliency Map to show."""

    code = "saliency"
    exit_code = 4

    def __init__(self, place: object, problem: str) -> None:
        super().__init__(f"{place} {problem}; give the directory or the id of a job of the method `nlft` that trains or has succeeded")


class Busy(EdgeAgentError):
    """Another process works in the job directory."""

    code = "busy"
    exit_code = 4

    def __init__(self, directory: Path) -> None:
        super().__init__(f"{directory} is locked by another running trainer; wait for it or stop it")


class ModelMissing(EdgeAgentError):
    """The model is not on this machine."""

    code = "model_missing"
    exit_code = 5

    def __init__(self, model: str, why: str) -> None:
        super().__init__(f"model {model!r}: {why}; give a directory with config.json and *.safetensors, or the id of a cached model")


class ModelUnknown(EdgeAgentError):
    """No model of this name was added to this node."""

    code = "model_missing"
    exit_code = 5

    def __init__(self, name: str, known: Iterable[str]) -> None:
        names = ", ".join(sorted(known)) or "none"
        super().__init__(f"no model {name!r} was added to this node ({names}); `edge-agent models list` shows what there is")


class ModelConflict(EdgeAgentError):
    """The name of a model is taken."""

    code = "conflict"
    exit_code = 4


class ModelNeeded(EdgeAgentError):
    """A model cannot go: jobs that have not ended need it."""

    code = "model_needed"
    exit_code = 4

    def __init__(self, name: str, jobs: list[str]) -> None:
        more = f" and {len(jobs) - 3:,} more" if len(jobs) > 3 else ""
        super().__init__(f"model {name!r} is needed by {', '.join(jobs[:3])}{more}; wait until they have ended, or cancel them")


class ModelSource(EdgeAgentError):
    """A model cannot be fetched from where it is."""

    code = "model_source"
    exit_code = 5

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}; see docs/models.md")


class ModelCorrupt(ModelSource):
    """What a source has is no model, or not what it has listed; nothing of it is kept."""


class ModelsFull(EdgeAgentError):
    """A model would take more than the configuration gives to all that are added."""

    code = "models_limit"
    exit_code = 8

    def __init__(self, name: str, needs_bytes: int, held_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"model {name!r} has {human_bytes(needs_bytes)}, those that were added {human_bytes(held_bytes)}, and `models_limit` is "
            f"{human_bytes(limit_bytes)}; remove one with `edge-agent models remove`, or raise the limit"
        )


class ModelUnsafe(EdgeAgentError):
    """The model would run code when loaded: pickled weights, or code of its own."""

    code = "model_unsafe"
    exit_code = 5

    def __init__(self, model: str, why: str) -> None:
        super().__init__(f"model {model!r}: {why}; use a revision with *.safetensors weights of an architecture that transformers knows")


class ModelUnsupported(EdgeAgentError):
    """The model loads, and cannot be fine-tuned here."""

    code = "model_unsupported"
    exit_code = 5

    def __init__(self, model: str, why: str) -> None:
        super().__init__(f"model {model!r}: {why}")


class DoesNotFit(EdgeAgentError):
    """The plan needs more than the budget."""

    code = "oom_predicted"
    exit_code = 6

    def __init__(self, needs_bytes: int, budget_bytes: int, stage: str, longest_tokens: int) -> None:
        fits = f"the longest record that fits has {longest_tokens:,} tokens" if longest_tokens else "no record fits this budget"
        super().__init__(
            f"the plan needs {human_bytes(needs_bytes)} (stage {stage}), the budget is {human_bytes(budget_bytes)}; "
            f"{fits}; raise --budget to at least {-(-needs_bytes // 2**20)}MiB, shorten the records, or take a smaller model"
        )
        self.needs_bytes = needs_bytes


class NoRoom(EdgeAgentError):
    """The machine has less free memory than the budget."""

    code = "no_room"
    exit_code = 6

    def __init__(self, what: str, free_bytes: int, needs_bytes: int) -> None:
        super().__init__(
            f"{what}: {human_bytes(free_bytes)} are free now, the plan needs {human_bytes(needs_bytes)}; "
            f"stop other work on the device and run again"
        )


class DeviceTooSmall(EdgeAgentError):
    """The plan fits the budget, and the device never has as much."""

    code = "no_room"
    exit_code = 6

    def __init__(self, device: str, memory_bytes: int, reserve_bytes: int, needs_bytes: int) -> None:
        super().__init__(
            f"{device} has {human_bytes(memory_bytes)}, of which {human_bytes(reserve_bytes)} are left to others, the plan needs "
            f"{human_bytes(needs_bytes)}; give --budget {(memory_bytes - reserve_bytes) // 2**20}MiB, for which smaller settings are tried"
        )


class DeviceMissing(EdgeAgentError):
    """The device that a job or a configuration asks for is not there, or PyTorch cannot use it."""

    code = "device_missing"
    exit_code = 11

    def __init__(self, why: str, cure: str = "run with --device cpu, or install the driver and a CUDA build of PyTorch") -> None:
        super().__init__(f"there is no GPU to use: {why}; {cure}")


class DeviceBusy(EdgeAgentError):
    """Another trainer has the GPU, of whatever agent or user."""

    code = "busy"
    exit_code = 4

    def __init__(self, gpu: str, file: Path) -> None:
        super().__init__(f"another trainer has {gpu} ({file} is locked); wait for its end, or name another GPU in CUDA_VISIBLE_DEVICES")


class ProfileUnknown(EdgeAgentError):
    """No device profile has the name that was given."""

    code = "profile_unknown"
    exit_code = 11

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"there is no device profile {name!r}; choose of {', '.join(known)}, or add a file to profiles/devices")


class OutOfMemory(EdgeAgentError):
    """The device or host ran out of memory although the plan fitted."""

    code = "oom_device"
    exit_code = 7

    def __init__(self, stage: str, detail: str) -> None:
        super().__init__(
            f"out of memory in stage {stage} ({detail}); start it anew with a larger budget, or run it again where others held the memory "
            "and more is free now: jobs and builds go on where they were"
        )
        self.detail = detail


class DiskFull(EdgeAgentError):
    """The file system of the job directory is full, or a quota is reached."""

    code = "disk_full"
    exit_code = 8

    def __init__(self, where: str, needs_bytes: int | None = None) -> None:
        need = f" ({human_bytes(needs_bytes)} are needed)" if needs_bytes else ""
        super().__init__(f"no space left for {where}{need}; free some space and run the same command again: it resumes")


class NonFiniteLoss(EdgeAgentError):
    """The loss became NaN or infinite."""

    code = "non_finite_loss"
    exit_code = 9

    def __init__(self, update: int, records: str) -> None:
        super().__init__(f"the loss is not finite at update {update} (records {records}); lower --learning-rate or check these records")


class TimedOut(EdgeAgentError):
    """A timer of the job ran out."""

    code = "timeout_run"
    exit_code = 10

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the run passed its limit of {limit_s:,g} s; the directory keeps its checkpoint: run it again to go on")


class AdapterMismatch(EdgeAgentError):
    """An adapter cannot be used with this model."""

    code = "adapter_mismatch"
    exit_code = 5

    def __init__(self, directory: Path, problem: str) -> None:
        super().__init__(f"adapter {directory}: {problem}")


class Stopped(EdgeAgentError):
    """The run was asked to stop."""

    code = "stopped"
    exit_code = 12

    def __init__(self) -> None:
        super().__init__("the run was asked to stop; the directory keeps what is done: run it again to go on")


class ConfigInvalid(EdgeAgentError):
    """A configuration file is not valid; the process can never start with it."""

    code = "config"
    exit_code = 13

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}; see docs/config.md")


class PackageMissing(EdgeAgentError):
    """A command needs packages of an extra that is not installed."""

    code = "package_missing"
    exit_code = 13

    def __init__(self, package: str | None, extra: str = "coordinator") -> None:
        super().__init__(f"the Python package {package!r} is not installed; run `{sys.executable} -m pip install 'edge-agent[{extra}]'`")


class JudgeMissing(EdgeAgentError):
    """The configuration of this machine has no endpoint of the name that judgments are asked from."""

    code = "judge_missing"
    exit_code = 15

    def __init__(self, alias: str, known: Iterable[str]) -> None:
        names = ", ".join(sorted(known)) or "none"
        super().__init__(f"endpoint {alias!r} is not among the [judges] of this machine's configuration ({names}); see docs/config.md")


class JudgeRefused(EdgeAgentError):
    """An endpoint does not take requests with the key, model or address that the configuration gives."""

    code = "judge_refused"
    exit_code = 15

    def __init__(self, alias: str, status: int) -> None:
        redirects = 300 <= status < 400
        super().__init__(
            f"endpoint {alias!r} {'redirects' if redirects else 'refuses'} requests for judgments with status {status}"
            f"{', and no redirect is followed' if redirects else ''}; check `key_file`, `model` and `url` of [judges.{alias}], "
            f"then run the same command again"
        )


class StateUnusable(EdgeAgentError):
    """The state directory of an agent or coordinator cannot be used."""

    code = "state"
    exit_code = 13

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"state directory {path}: {problem}")


class ServiceUnusable(EdgeAgentError):
    """A daemon cannot be made a service of systemd as it was asked."""

    code = "service"
    exit_code = 13


class DatabaseUnusable(StateUnusable):
    """The database server of a coordinator can be reached, and its database cannot be used."""

    def __init__(self, where: str, problem: str) -> None:
        EdgeAgentError.__init__(self, f"database {where}: {problem}")


class DatabaseAway(EdgeAgentError):
    """The database server of a coordinator does not answer, or has no room or leave to store something now."""

    code = "database_away"

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(
            f"database {where} does not answer ({problem}); look whether it runs, can be reached and has room: "
            f"the coordinator goes on as soon as it is back, and nodes keep what they say until then"
        )
        self.where, self.problem = where, problem


class FilesUnusable(StateUnusable):
    """The object store of a coordinator's files can never be used as it is configured."""

    def __init__(self, where: str, problem: str) -> None:
        EdgeAgentError.__init__(self, f"object store {where}: {problem}; see docs/config.md")


class FilesAway(EdgeAgentError):
    """The object store of a coordinator's files does not give or take a file now."""

    code = "files_away"

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(
            f"object store {where}: {problem}; look whether it can be reached, has room, and lets the coordinator in: "
            "what waits for it goes on as soon as it does"
        )


class StateDamaged(EdgeAgentError):
    """A daemon's database has broken while it worked."""

    code = "state_damaged"

    def __init__(self, problem: str) -> None:
        super().__init__(f"the database in the state directory is damaged: {problem}; start the daemon again, which says what to do")


class MessageInvalid(EdgeAgentError):
    """A message does not follow the contract."""

    code = "job_schema"
    exit_code = 4

    def __init__(self, problem: str) -> None:
        super().__init__(f"the message is not valid: {problem}; see docs/asyncapi.yaml")


class CoordinatorUnreachable(EdgeAgentError):
    """No coordinator answers at its address."""

    code = "coordinator"
    exit_code = 14

    def __init__(self, place: str, problem: str, *, asked: bool = False) -> None:
        """`asked`: whether the request may have come to it."""
        self.asked = asked
        super().__init__(
            f"no coordinator answers at {place} ({problem}); start `edge-agent coordinator`, or give its --config or --coordinator"
        )


class Refused(EdgeAgentError):
    """The coordinator refuses a request."""

    code = "refused"
    exit_code = 14


class Unknown(Refused):
    """The coordinator has no such job, rollout, node, file or token."""


class Unauthorized(EdgeAgentError):
    """A request to the coordinator has no token that is valid."""

    code = "unauthorized"
    exit_code = 14

    def __init__(self) -> None:
        super().__init__("the coordinator does not know this token, or there is none; `edge-agent tokens new` makes one on its machine")


class Forbidden(EdgeAgentError):
    """A token is valid, and not for this request."""

    code = "forbidden"
    exit_code = 14

    def __init__(self, scope: str, needed: str) -> None:
        super().__init__(f"this token may {scope}, the request takes one that may {needed}")


class TooManyRequests(EdgeAgentError):
    """Somebody asks the coordinator more often than they may."""

    code = "too_many_requests"
    exit_code = 14

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"too many requests; the next one is answered in {wait_s:.1f} s")
        self.wait_s = wait_s


class NotAlive(EdgeAgentError):
    """No agent works in a state directory, or its loop does not turn."""

    code = "not_alive"

    def __init__(self, directory: Path, problem: str) -> None:
        super().__init__(f"state directory {directory}: {problem}; start the agent anew, and look into its log")


class TrackerAway(EdgeAgentError):
    """A tracking server does not answer, or does not take what is to be recorded."""

    code = "tracker_away"
    exit_code = 17

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(
            f"MLflow at {place} records nothing ({problem}); look whether it runs, can be reached and lets you in, then run the same "
            f"command again: what is recorded already is left as it is"
        )


class DemoFailed(EdgeAgentError):
    """The demo could not run to its end."""


class JobEnded(EdgeAgentError):
    """A job on a node ended without success; `code` is its reason, `exit_code` that of the same error in a local run."""

    def __init__(self, job: str, outcome: str, code: str, text: str) -> None:
        super().__init__(f"job {job} {outcome.replace('_', ' ')}: {text}")
        self.code, self.exit_code = code, exit_code_of(code)


def exit_code_of(code: str) -> int:
    """Return the exit code of the error class with a stable code; 1 where only a node knows that code."""
    classes = [EdgeAgentError]
    while classes:
        kind = classes.pop()
        if kind.__dict__.get("code") == code:
            return kind.exit_code
        classes += kind.__subclasses__()
    return EdgeAgentError.exit_code


NOT_ACCEPTED_EXIT_CODE = 16
"""Of `edge-agent train` and `watch`, where a job has succeeded and its adapter does not pass the job's `accept_if`: no error."""

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
