"""The jobs of a node: from an offer through its files and its trainer to a stored result. One job runs at a time."""

from __future__ import annotations

import hashlib
import logging
import shutil
import sqlite3
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec

from edge_agent.admission import Rejected, check_contents, check_order, open_envelope
from edge_agent.clocks import ToldTime
from edge_agent.config import CACHE_LIMIT_VARIABLE, CACHE_VARIABLE, AgentConfig
from edge_agent.dataset import file_sha256
from edge_agent.delivery import Uplink
from edge_agent.errors import Busy, ConfigInvalid, DeviceBusy, DiskFull, EdgeAgentError, JobSchema, ModelMissing
from edge_agent.files import lock_file
from edge_agent.https import Carried, Courier
from edge_agent.job import Job, NlftOptions
from edge_agent.job_directory import JobDirectory
from edge_agent.messages import (
    Artifact,
    ArtifactName,
    File,
    FileRequest,
    Forgotten,
    JobResult,
    JobStatus,
    Offer,
    Options,
    Order,
    Outcome,
    Phase,
    Reason,
    decode,
    read_order,
)
from edge_agent.models import offered
from edge_agent.new_options import NewOptions, check_change
from edge_agent.report import Event, EventKind
from edge_agent.rest import Rest, Rests
from edge_agent.runner import Ending, Trainer, TrainerEnded, TrainerEvent, end_orphan, known_reason
from edge_agent.store import HAS_TRAINER, JobRow, Store
from edge_agent.transfer import FileStore, Incoming, read_blocks
from profiles.device import DeviceProfile
from profiles.gpu_lock import hold_gpu

log = logging.getLogger(__name__)

ORPHAN_S = 10.0
"""The trainer of a daemon that died ends by itself within 8 s; later it is killed."""
RECORD = "trainer.pid"
"""The file that says which process the trainer is; it outlives a database that was set aside."""
SUSPENDED_S = 5.0
"""Between two looks at the jobs, which are a second apart otherwise."""
PHASE_OF: dict[EventKind, Phase] = {"paused": "paused", "continued": "running"}
"""What a trainer says that changes the phase of its job."""
SPENT_S = 60.0
"""Between two writings of how long a trainer has run: what an agent that is killed forgets at most."""
RUN_GRACE_S = 120.0
"""The trainer keeps `max_run_s` itself, from its first stage on; the agent ends it this much later."""


class Jobs:
    """Moves every job as far as it can go; called by the agent's one thread."""

    def __init__(
        self, config: AgentConfig, device: DeviceProfile, store: Store, uplink: Uplink, events: SimpleQueue[Any], rest: Rest
    ) -> None:
        self._config, self._device, self._store, self._uplink, self._events, self._rest = config, device, store, uplink, events, rest
        self._files = FileStore(config.state_directory / "files")
        self._courier = Courier(config.file_servers, events)
        self._incoming: dict[str, Incoming] = {}
        self._orphan_since: float | None = None
        self._gpu_awaited_by: str | None = None
        """The job of which it was said that it waits for the trainer of another agent."""
        self._finalizing: dict[str, float] = {}
        """Since when what a job made is to be kept, in seconds that the agent has run."""
        self._ticked_at = self._spent_at = time.monotonic()
        self.trainer: Trainer | None = None
        self._told_time = ToldTime()
        self._untimed: dict[str, bytes] = {}

    # what the agent calls

    def recover(self) -> None:
        """Take up what an earlier agent left: a job that ran goes on from its checkpoint."""
        for row in self._store.open_jobs():
            if row.phase in HAS_TRAINER:
                self._interrupted(row, "the agent ended while it ran")
        self._files.sweep({sha256 for row in self._store.open_jobs() for sha256 in _contents(row)})

    def offer(self, job: str, payload: bytes) -> None:
        """Take an offer, or say why not. Taken, it is in the store when this returns; a rejection that is lost follows the next offer.

        Whether a new one has expired is known when the coordinator has told its time; until then it waits.
        Raises ConfigInvalid where this node cannot know whom to trust.
        """
        order, row = None, self._store.job(job)
        try:
            offer = decode(payload, Offer).data
            order = open_envelope(offer.order, Order, self._config, id=job)
            if row is not None and row.digest != order.job.digest:
                raise Rejected("conflict", "a job with this id and another document is here; submit it under a new id")
            if row is not None:
                self._store.tell_again(row)
                return
            if (status := self._store.closed(job)) is not None:
                self._refuse(job, status, payload)
                return
            if (now := self._told_time.now()) is None:
                log.info("offer_waits job=%s", job)
                if len(self._untimed) < self._config.queue:  # others come again
                    self._untimed[job] = payload
                return
            check_order(order, self._config, self._device, self.waiting(), self._store.draining, now)
            check_contents(offer, order)
            for sha256, contents in offer.contents.items():
                self._files.put(contents, sha256)
        except ConfigInvalid:  # the file of trusted keys is broken: neither taken nor rejected, the offer comes again
            raise
        except (Rejected, EdgeAgentError) as error:
            reason = error.reason if isinstance(error, Rejected) else known_reason(error.code)
            self._reject(job, row, order, payload, reason, str(error))
            return
        self._store.accept(job, order.job.digest, offer.order.payload, order.priority)
        log.info("job_accepted job=%s model=%s priority=%d", job, order.job.model, order.priority)

    def take_time(self, told: datetime) -> None:
        """The coordinator has told its time: judge orders by it, also those that wait for it."""
        self._told_time.set(told)
        for job, payload in list(self._untimed.items()):
            self.offer(job, payload)
            del self._untimed[job]

    def _refuse(self, job: str, status: JobStatus, payload: bytes) -> None:
        """Answer the message of an offer that is not taken."""
        self._uplink.ask(msgspec.structs.replace(status, refused=hashlib.sha256(payload).hexdigest()), "job", job, "status")

    def _reject(self, job: str, row: JobRow | None, order: Order | None, payload: bytes, reason: Reason, text: str) -> None:
        """Say that an offer is not taken. Of one that can be read this answer is kept, so that nobody can send it again later."""
        if row is not None and order is None:  # what cannot be read, or comes from nobody, must not end the job that is here
            log.warning("offer_ignored job=%s text=%r", job, text)
            self._store.tell_again(row)
            return
        status = JobStatus(order.job.digest if order else None, "ended", "rejected", reason, text[:1024])
        if order is not None and row is None:
            self._store.close_job(job, status)
        self._refuse(job, status, payload)
        log.info("job_rejected job=%s reason=%s text=%r", job, reason, text)

    def cancel(self, job: str) -> None:
        """End a job, or ask its trainer to; the answer is the job's result. One that is not here must not come any more."""
        row = self._store.job(job)
        if row is None:
            text = "it was canceled before its offer came"
            if self._store.closed(job) is None:
                self._store.close_job(job, JobStatus(None, "ended", "rejected", "canceled", text))
            self._uplink.ask(JobResult(None, "canceled", "canceled", text), "job", job, "result")
        elif row.phase == "ended":
            self._store.tell_again(row)
        elif self.trainer is not None and self.trainer.job == job:
            self._store.ask_cancel(job)
            self.trainer.stop()
        elif row.phase != "finalizing":
            self._end(row, "canceled", "canceled", "it was canceled before its trainer ran")

    def take_options(self, sent: Options) -> None:
        """Keep what a job is to go on with, or say why it does not; its trainer takes the newest. The answer is the job's status.

        They are in the store when this returns. Older ones change nothing.
        """
        row = self._store.job(sent.job)
        if row is None or row.phase in ("finalizing", "ended"):
            log.info("options_ignored job=%s number=%d phase=%s", sent.job, sent.number, row.phase if row else None)
            if row is not None:
                self._store.tell_again(row)
            return
        state = row.sent_options
        if sent.number <= state.number:
            self._store.tell_again(row)
        else:
            why = _why_not(read_order(row.payload).job, sent.method)
            log.info("options_kept job=%s number=%d refused=%r", sent.job, sent.number, why)
            options = None if why else NewOptions(sent.number, sent.method)
            self._store.set_options(sent.job, msgspec.structs.replace(state, number=sent.number, refused=why), options)
        if self.trainer is not None and self.trainer.job == sent.job:
            self._lay_down_options(sent.job)

    def _lay_down_options(self, job: str) -> None:
        """Put the newest options of a job where its trainer looks for them between updates."""
        row = self._store.job(job)
        if row is not None and (options := row.new_options) is not None:
            JobDirectory(self._directory(job)).write_options(options)

    def _hear_of_options(self, row: JobRow, event: Event) -> None:
        """Keep what a trainer says that it has done with the options that it was given."""
        state = known = row.sent_options
        if event.event == "options_taken":
            state = msgspec.structs.replace(known, taken=event.number, update=event.done)
        elif event.number in (None, known.number):
            state = msgspec.structs.replace(known, refused=event.text)
        if state != known:
            log.info("options_heard job=%s event=%s number=%s update=%s text=%r", row.id, event.event, event.number, event.done, event.text)
            self._store.set_options(row.id, state)

    def report(self) -> None:
        """Tell again where every job stands of which the coordinator may not know the end."""
        for row in self._store.unacknowledged_jobs():
            self._store.tell_again(row)

    def forget(self, job: str) -> None:
        """Delete a job with all its files, and say so. One whose end the coordinator has not acknowledged stays, and nothing is said."""
        row = self._store.job(job)
        if row is not None and row.settled is None:
            return
        with suppress(FileNotFoundError):
            shutil.rmtree(self._directory(job))
        if row is not None:
            for sha256 in _contents(row) - {s for other in self._store.jobs() if other.id != job for s in _contents(other)}:
                self._files.remove(sha256)
            log.info("job_forgotten job=%s", job)
        # The row goes last: where the disk fails before, all this is done again.
        status = JobStatus(row.digest if row else None, "ended", "rejected", "replayed", "this job was here, and has been deleted")
        self._store.forget(job, status)
        self._uplink.ask(Forgotten(), "job", job, "forgotten")

    def _forget_settled(self) -> None:
        """Delete what one job has left whose time is over."""
        if (job := self._store.settled_for(self._config.retention_s)) is not None:
            self.forget(job)

    def receive_block(self, sha256: str, number: int, block: bytes) -> None:
        if (incoming := self._incoming.get(sha256)) and incoming.receive(number, block):
            del self._incoming[sha256]

    def send_blocks(self, sha256: str, request: FileRequest) -> None:
        """Bring an artifact that the coordinator has not acknowledged yet to it; else send the blocks that it asks for."""
        file = self._file_for_coordinator(sha256)
        if file is not None and not self._courier.send(file, sha256, request):
            for number, block in read_blocks(file, request):
                self._uplink.send_block(sha256, number, block)

    def _file_for_coordinator(self, sha256: str) -> Path | None:
        """Return the place of a file that the coordinator may have: an artifact, or the Saliency Map of the job that runs."""
        if sha256 in self._needed_artifacts():
            return self._files.path(sha256)
        shown = self.trainer is not None and self.trainer.saliency is not None and self.trainer.saliency.sha256 == sha256
        return JobDirectory(self._directory(self.trainer.job)).saliency if shown and self.trainer else None

    def ask_saliency(self, job: str) -> None:
        """Have the trainer of a job write its Saliency Map before its next update; who asks will ask again."""
        with suppress(OSError):
            JobDirectory(self._directory(job)).saliency_wanted.touch()

    def carried(self, event: Carried) -> None:
        """Go on with a file whose way by HTTPS has ended: it may not have come to its end."""
        self._courier.ended(event)
        if incoming := self._incoming.get(event.sha256):
            incoming.ask_again()
        if event.request is not None and event.why is not None:
            self.send_blocks(event.sha256, event.request)

    def link_is_new(self) -> None:
        for incoming in self._incoming.values():
            incoming.ask_again()

    def tick(self) -> None:
        """Move every job as far as it can go now."""
        now = time.monotonic()
        if self.trainer is not None and now - self._ticked_at > SUSPENDED_S:
            self.trainer.heard = now  # this process was suspended: what the trainer said meanwhile is still to be read
        self._ticked_at = now
        self._store.clock.tick()
        for row in self._store.open_jobs():
            if row.phase in ("accepted", "staging"):
                self._stage(row)
            elif row.phase == "finalizing":
                self._finalize(row)
            elif row.phase in HAS_TRAINER and self.trainer is None:  # the disk failed while it was to be started
                self._interrupted(row, "its trainer was not started")
        self._forget_settled()
        rest = self._rest.due()
        if self.trainer is not None:
            self._let_rest(self.trainer, rest)
            self._watch(self.trainer)
            if now - self._spent_at > SPENT_S:
                self._spend_time(self.trainer)
        elif rest is None and (ready := next((r for r in self._store.open_jobs() if r.phase == "ready"), None)):
            self._start(ready)

    def waiting(self) -> int:
        """Jobs that have neither ended nor begun to run."""
        return sum(r.phase in ("accepted", "staging", "ready") for r in self._store.open_jobs())

    def shut_down(self) -> None:
        """Stop the trainer; its job goes on at the next start of the agent."""
        trainer = self.trainer
        if trainer is None:
            return
        trainer.stop()
        if not trainer.wait(self._config.timers.stop_s):
            trainer.kill()
            trainer.wait(self._config.timers.stop_s)
        try:
            row = self._store.job(trainer.job)
            if row is not None and row.phase in HAS_TRAINER:
                self._spend_time(trainer)
                self._store.move(row.id, "ready")
        except (OSError, sqlite3.Error, DiskFull) as error:
            log.error("storage_error error=%r", error)  # the next agent finds it running, and goes on with it

    # files

    def _directory(self, job: str) -> Path:
        return self._config.state_directory / "jobs" / job

    def _stage(self, row: JobRow) -> None:
        """Get the files of a job; with the last one its directory is laid down."""
        if row.phase == "accepted":
            row = self._store.move(row.id, "staging")
        order = read_order(row.payload)
        missing = [f for f in order.files if not self._files.has(f.sha256)]
        if missing and self._store.clock.now() - row.arrived > self._config.timers.staging_s:
            self._end(row, "timed_out", "timeout_staging", f"its files did not come within {self._config.timers.staging_s:,.0f} s")
            return
        try:
            for file in missing:
                self._fetch(file)
            if not missing:
                self._lay_down(row.id, order.job)
                self._store.move(row.id, "ready")
        except Busy:  # its trainer outlived an agent whose database is lost
            self._wait_for_orphan()
        except EdgeAgentError as error:
            self._end(row, "failed", known_reason(error.code), str(error))

    def _fetch(self, file: File) -> None:
        incoming = self._incoming.get(file.sha256)
        if incoming is None:
            incoming = self._incoming[file.sha256] = Incoming(
                self._files, file.sha256, file.size_bytes, self._uplink.payload_limit, lambda request: self._ask(file, request)
            )
        if incoming.tick():
            del self._incoming[file.sha256]

    def _ask(self, file: File, request: FileRequest) -> bool:
        """Have a file server send what is missing of a file, else the coordinator. What came wrong comes from the coordinator."""
        incoming = self._incoming[file.sha256]
        if not incoming.mistaken and self._courier.fetch(file, incoming.missing):
            return True
        return self._uplink.send(request, "file", file.sha256, "request")

    def _lay_down(self, job: str, document: Job) -> None:
        """Write the job's directory. The name of the model becomes its place on this node, and `auto` this node's device.

        The only GPU that a trainer sees is the one that the configuration names.
        """
        model = offered(self._config).get(document.model)
        if model is None:
            raise ModelMissing(document.model, "it was taken from this node")
        device = self._config.job_device if document.device == "auto" else document.device
        local = msgspec.structs.replace(document, model=str(model), device=device)
        evaluation = document.dataset.evaluation_sha256
        JobDirectory(self._directory(job)).create(
            local, self._files.path(document.dataset.sha256), self._files.path(evaluation) if evaluation else None
        )

    # the trainer

    def _start(self, row: JobRow) -> None:
        if row.cancel:
            self._end(row, "canceled", "canceled", "it was canceled while its trainer ran; the directory keeps its checkpoint")
            return
        if row.attempt == 0 and self._store.clock.now() - row.arrived > self._config.timers.queue_s:
            self._end(row, "timed_out", "expired", f"it waited longer than {self._config.timers.queue_s:,.0f} s")
            return
        self._lay_down_options(row.id)
        lock = lock_file(self._config.state_directory / "trainer.lock")
        if lock is None:
            self._wait_for_orphan()
            return
        self._orphan_since = None
        try:
            gpu = hold_gpu(self._device)
        except DeviceBusy as error:
            lock.close()
            self._wait_for_gpu(row, error)
            return
        self._gpu_awaited_by = None
        row = self._store.move(row.id, "running", start=True)
        try:
            job, judges = read_order(row.payload).job, self._config.judges
            asked = {alias: judge for alias, judge in judges.items() if alias == job.judging.endpoint}
            cache = {CACHE_VARIABLE: str(self._config.cache_directory), CACHE_LIMIT_VARIABLE: str(int(self._config.cache_limit))}
            self.trainer = Trainer(
                row.id, self._directory(row.id), lock, job.max_run_s, self._config.threads, self._events, asked, cache,
                row.ran_s, row.cooled_s, gpu,
            )  # fmt: skip
        except OSError as error:
            lock.close()
            if gpu is not None:
                gpu.close()
            self._interrupted(row, f"the trainer cannot be started: {error}")
            return
        self.trainer.record(self._config.state_directory / RECORD)
        log.info("trainer_started job=%s attempt=%d pid=%d", row.id, row.attempt, self.trainer.pid)

    def _wait_for_orphan(self) -> None:
        """The trainer of an earlier agent in the same state directory still holds its lock."""
        now = time.monotonic()
        if self._orphan_since is None:
            self._orphan_since = now
            log.info("orphan_awaited")
        if now - self._orphan_since > ORPHAN_S and (pid := end_orphan(self._config.state_directory / RECORD)) is not None:
            log.warning("orphan_killed pid=%d", pid)

    def _wait_for_gpu(self, row: JobRow, error: DeviceBusy) -> None:
        """The trainer of another agent or user has the GPU: it is theirs to end."""
        if self._gpu_awaited_by != row.id:
            self._gpu_awaited_by = row.id
            log.info("gpu_awaited job=%s text=%r", row.id, str(error))

    def _let_rest(self, trainer: Trainer, rest: Rests | None) -> None:
        """Have the trainer do what the node does.

        In quiet hours it writes a checkpoint, gives the memory back and ends. It waits in place until the device has cooled: one that gets
        hot in every stage would begin some of them again for ever.
        """
        known = trainer.rests.reason if trainer.rests else None
        if trainer.stopping_since is not None or known == (rest.reason if rest else None):
            return
        if rest is None:
            log.info("trainer_works job=%s", trainer.job)
        else:
            log.info("trainer_rests job=%s reason=%s text=%r", trainer.job, rest.reason, rest.text)
        trainer.rest(rest)
        if rest is not None and rest.reason == "quiet_hours":
            trainer.stop()

    def _spend_time(self, trainer: Trainer) -> None:
        """Have the next start know how long this one has run."""
        self._spent_at = time.monotonic()
        self._store.spend_time(trainer.job, trainer.ran_s, trainer.cooled_s)

    def _watch(self, trainer: Trainer) -> None:
        """Keep the timers of the running trainer."""
        now, timers = time.monotonic(), self._config.timers
        if trainer.stopping_since is not None:
            if now - trainer.stopping_since > timers.stop_s:
                trainer.kill()
        elif now - trainer.heard > timers.stall_s:
            trainer.kill(Ending("timed_out", "timeout_stall", f"the trainer gave no sign for {timers.stall_s:,.0f} s and was killed"))
        elif trainer.cooled_s > timers.cooling_s:
            text = f"its trainer has waited more than {timers.cooling_s:,.0f} s for the device to cool; look at its fan, or raise the limit"
            trainer.stop(Ending("failed", "thermal", text))
        elif trainer.ran_s > (limit_s := trainer.max_run_s) + RUN_GRACE_S:
            trainer.kill(Ending("timed_out", "timeout_run", f"the run passed its limit of {limit_s:,.0f} s and was killed"))

    def hear(self, told: TrainerEvent) -> None:
        """Take in what the running trainer says; that it waits, and that it goes on, are phases of its job."""
        trainer, row = self.trainer, self._store.job(told.job)
        if trainer is None or row is None or trainer.job != told.job:
            return
        trainer.hear(told.event)
        if told.event.event == "locked_down":
            _log_lockdown(told)
        elif told.event.event in ("options_taken", "options_refused") and row.phase in HAS_TRAINER:
            self._hear_of_options(row, told.event)
        elif told.event.event == "saliency_written":
            file = JobDirectory(self._directory(told.job)).saliency
            with suppress(OSError):
                trainer.saliency = Artifact("saliency.json", file_sha256(file), file.stat().st_size)
        phase = PHASE_OF.get(told.event.event)
        if phase is not None and row.phase in HAS_TRAINER - {phase}:
            reason, text = (trainer.rests if told.event.code == "thermal" else None) or (None, None)
            self._store.move(row.id, phase, reason=reason, text=text)
            log.info("job_phase job=%s phase=%s stage=%s", row.id, phase, told.event.stage)

    def trainer_ended(self, event: TrainerEnded) -> None:
        """Read how the trainer ended and move its job on. May be called again if the disk failed."""
        trainer, row = self.trainer, self._store.job(event.job)
        if trainer is not None and row is not None and row.phase in HAS_TRAINER:
            self._spend_time(trainer)
            self._read_ending(row, trainer, event)
        self.trainer = None

    def _read_ending(self, row: JobRow, trainer: Trainer, event: TrainerEnded) -> None:
        ending = trainer.ending(event.code)
        log.info("trainer_ended job=%s code=%d seconds=%.1f", row.id, event.code, time.monotonic() - trainer.started)
        if ending.outcome == "succeeded":
            self._store.move(row.id, "finalizing")
        elif ending.outcome is not None:
            self._end(row, ending.outcome, ending.reason, ending.text)
        elif row.cancel:
            self._end(row, "canceled", "canceled", "it was canceled while its trainer ran; the directory keeps its checkpoint")
        elif ending.reason is None:
            reason, text = trainer.rests or (None, None)
            self._store.move(row.id, "ready", reason=reason, text=text)
        else:
            if ending.reason == "oom_host":
                self._missed(row, trainer, ending.text or "")
            self._interrupted(row, ending.text or "", ending.reason)

    def _missed(self, row: JobRow, trainer: Trainer, how: str) -> None:
        """Have the next start plan for less than the one that lacked memory."""
        stage = trainer.last_event.stage if trainer.last_event else None
        with suppress(OSError, msgspec.MsgspecError):  # ended before it had a plan
            JobDirectory(self._directory(row.id)).add_miss(stage or "load", how)

    def _interrupted(self, row: JobRow, how: str, reason: Reason = "crash_loop") -> None:
        """The trainer, or the agent with it, ended without being asked: start it again, but not for ever."""
        if row.crashes + 1 >= self._config.max_attempts:
            self._end(row, "failed", reason, f"{row.crashes + 1} starts ended without a result; the last: {how}")
            return
        log.warning("job_interrupted job=%s crashes=%d how=%r", row.id, row.crashes + 1, how)
        self._store.move(row.id, "ready", crashed=True)

    # the end

    def _finalize(self, row: JobRow) -> None:
        """End a job that has succeeded with what it made; as failed where that could not be kept for too long."""
        now, limit_s = self._store.clock.now(), self._config.timers.finalizing_s
        since = self._finalizing.setdefault(row.id, now)
        try:
            self._end(row, "succeeded", None, None)
        except (OSError, EdgeAgentError) as error:
            if now - since <= limit_s:
                raise
            reason = known_reason(error.code) if isinstance(error, EdgeAgentError) else "internal"
            text = f"what it made could not be kept for {limit_s:,.0f} s: {error}; it is still in the job's directory on the node"
            self._tell_end(row, JobResult(row.digest or None, "failed", reason, text[:1024]))
        del self._finalizing[row.id]

    def _end(self, row: JobRow, outcome: Outcome, reason: Reason | None, text: str | None) -> None:
        self._tell_end(row, self._result(row.id, row.digest, outcome, reason, text))

    def _tell_end(self, row: JobRow, result: JobResult) -> None:
        """Store the end of a job, and delete what only it needed."""
        self._store.end(row.id, result)
        log.info(
            "job_ended job=%s outcome=%s reason=%s attempt=%d seconds=%s peak_bytes=%s text=%r",
            row.id, result.outcome, result.reason, row.attempt, result.seconds, result.peak_bytes, result.text,
        )  # fmt: skip
        needed = {sha256 for r in self._store.open_jobs() for sha256 in _contents(r)}
        for sha256 in set(self._incoming) - needed:
            self._incoming.pop(sha256).discard()
        self._files.remove_unused(self._config.store_limit, needed | self._needed_artifacts())

    def _result(self, job: str, digest: str, outcome: Outcome, reason: Reason | None, text: str | None) -> JobResult:
        """Put what the job made into the store of files, and describe it."""
        directory = JobDirectory(self._directory(job))
        measured = directory.read_result()
        places: dict[ArtifactName, Path] = {"result.json": directory.result_file} if measured else {}
        if outcome == "succeeded":
            places["adapter_config.json"] = directory.adapter / "adapter_config.json"
            places["adapter_model.safetensors"] = directory.adapter / "adapter_model.safetensors"
            places["saliency.json"] = directory.saliency
        accepted = measured.accepted if measured and outcome == "succeeded" else None
        if measured and accepted is not None:
            text = measured.acceptance
        found = {name: file for name, file in places.items() if file.is_file()}
        artifacts = tuple(Artifact(name, self._files.adopt(file), file.stat().st_size) for name, file in found.items())
        return JobResult(
            digest or None, outcome, reason, text and text[:1024], measured.accuracy if measured else None,
            measured.seconds if measured else None, measured.peak_bytes if measured else None, artifacts, accepted,
            measured.tokens_per_s if measured else None, measured.energy.total_j if measured else None,
        )  # fmt: skip

    def _needed_artifacts(self) -> set[str]:
        """Artifacts that the coordinator may not have yet."""
        results = [row.result for row in self._store.unacknowledged_jobs() if row.result is not None]
        return {a.sha256 for result in results for a in msgspec.json.decode(result, type=JobResult).artifacts}


def _why_not(job: Job, method: NlftOptions) -> str | None:
    """Return why a job cannot go on with other options; None where it can."""
    try:
        check_change(job.method, method)
    except JobSchema as error:
        return str(error)[:1024]
    return None


def _log_lockdown(told: TrainerEvent) -> None:
    """Say what a trainer has given up, and what it could not."""
    event = told.event
    if event.done == event.total:
        log.info("trainer_locked_down job=%s text=%r", told.job, event.text)
    else:
        log.warning("trainer_not_locked_down job=%s text=%r", told.job, event.text)


def _contents(row: JobRow) -> set[str]:
    """The files that a job brought and made."""
    brought = read_order(row.payload).files
    made = msgspec.json.decode(row.result, type=JobResult).artifacts if row.result else ()
    return {f.sha256 for f in brought} | {a.sha256 for a in made}
