"""Whether a node does what it is told: who has signed it, and for whom; of offers also arithmetic on what is declared. Without torch."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

from edge_agent.config import AgentConfig, Trust
from edge_agent.errors import JudgeMissing, human_bytes
from edge_agent.job import Job
from edge_agent.messages import LONGEST_ORDER_S, MAX_INLINE_BYTES, PAYLOAD_TYPES, A, Envelope, Offer, Order, Reason, read_payload
from edge_agent.models import offered
from profiles.calibration import calibrated
from profiles.device import DeviceProfile
from quantization.estimate import Lengths, make_estimate
from quantization.ladder import Rows
from quantization.model_files import ModelFiles, find_model
from quantization.shape import Shape, read_shape

CLOCK_S = 3600.0
"""How far the clock of a coordinator may be set back until what it has issued before counts for nothing."""


class Rejected(Exception):
    """What was sent is not done; `reason` is its code on the wire."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def open_envelope(envelope: Envelope, kind: type[A], config: AgentConfig, **topic: str) -> A:
    """Return the payload of an envelope that a trusted key has signed, if this node asks for that, and that is for this node.

    `topic` holds fields of it that the topic names too. The keys are read anew each time, so that they can be changed while the agent
    runs. Raises Rejected, MessageInvalid, ConfigInvalid.
    """
    if envelope.payload_type != PAYLOAD_TYPES[kind]:
        raise Rejected("job_schema", f"the payload is {envelope.payload_type!r}, only {PAYLOAD_TYPES[kind]!r} is taken here")
    _check_signature(envelope, config.trust)
    payload = read_payload(envelope.payload, kind)
    for name, own in {"fleet": config.fleet, "node": config.node, **topic}.items():
        if (named := getattr(payload, name)) != own:
            raise Rejected("audience", f"what is signed is for {name} {named!r}, it was sent to {own!r}")
    return payload


def _check_signature(envelope: Envelope, trust: Trust | None) -> None:
    if trust is None or not (trust.required or envelope.signatures):
        return
    from edge_agent.signing import SignatureInvalid, read_trusted, verify  # takes megabytes of an agent that idles

    try:
        verify(envelope, read_trusted(trust.keys_file))
    except SignatureInvalid as error:
        raise Rejected("signature", str(error)) from None


def check_order(order: Order, config: AgentConfig, device: DeviceProfile, waiting: int, draining: bool, now: datetime) -> None:
    """Raise Rejected, or the EdgeAgentError that a run of this job would raise, where the node does not take the order.

    `now` is the time by the coordinator's clock, by which it has issued the order, whatever the node's own says.
    Does not cover what only a tokenizer can tell: the plan is a lower bound, with records of one token.
    """
    job = order.job
    if (order.expires - order.issued).total_seconds() > LONGEST_ORDER_S:
        raise Rejected("expired", f"an order is valid for {LONGEST_ORDER_S:,.0f} s at most; submit the job with a shorter --expires-s")
    if not order.issued - timedelta(seconds=CLOCK_S) <= now <= order.expires:
        begin, end, told = (t.isoformat(timespec="seconds") for t in (order.issued, order.expires, now))
        raise Rejected("expired", f"the order is valid from {begin} to {end}, the coordinator's clock says {told}; submit the job again")
    if draining:
        raise Rejected("draining", "the node takes no new jobs; `resume` it, or choose another")
    if waiting >= config.queue:
        raise Rejected("busy", f"{waiting} jobs wait already, the limit of this node; wait, or choose another node")
    _check_files(order, config)
    check_job(job, config, device)
    _check_model(order, config, device)


def check_job(job: Job, config: AgentConfig, device: DeviceProfile) -> None:
    """Raise Rejected where a node lacks what a job asks for, whatever is in its files."""
    if job.budget_bytes > config.budget:
        asked, lent = human_bytes(job.budget_bytes), human_bytes(config.budget)
        raise Rejected("oom_predicted", f"the job's budget is {asked}, this node lends {lent}; submit it with a smaller --budget")
    _model_place(job.model, config)
    alias = job.judging.endpoint
    if alias is not None and alias not in config.judges:
        raise Rejected("judge_missing", str(JudgeMissing(alias, config.judges)))
    if job.device not in ("auto", device.torch_device):
        raise Rejected("device_missing", f"the job asks for {job.device}, this node has {device.torch_device}")


def check_contents(offer: Offer, order: Order) -> None:
    """Raise Rejected where an offer brings files that nobody asked for, or too much of them."""
    if unknown := set(offer.contents) - {f.sha256 for f in order.files}:
        raise Rejected("dataset_checksum", f"the offer brings a file {min(unknown)} that its order does not name")
    if (inline := sum(map(len, offer.contents.values()))) > MAX_INLINE_BYTES:
        raise Rejected(
            "dataset_too_large", f"{inline:,} bytes of files inside the offer, at most {MAX_INLINE_BYTES:,}; send them in blocks"
        )


def _check_files(order: Order, config: AgentConfig) -> None:
    wanted = {"dataset": order.job.dataset.sha256, "evaluation": order.job.dataset.evaluation_sha256}
    brought = {"dataset": order.dataset, "evaluation": order.evaluation}
    for name, sha256 in wanted.items():
        file = brought[name]
        if (file.sha256 if file else None) != sha256:
            raise Rejected("dataset_checksum", f"the job names {name} {sha256}, the order {file.sha256 if file else None}")
        if file is not None and file.size_bytes > config.dataset_limit:
            size, limit = human_bytes(file.size_bytes), human_bytes(config.dataset_limit)
            raise Rejected("dataset_too_large", f"{name} has {size}, the limit of this node is {limit}; split it")


def read_model(name: str, config: AgentConfig) -> tuple[ModelFiles, Shape]:
    """Return the files and sizes of a model that jobs may use. Raises Rejected, or an EdgeAgentError."""
    try:
        files = find_model(str(_model_place(name, config)))
        return files, read_shape(files)
    except OSError as error:
        raise Rejected("model_missing", f"model {name!r} cannot be read on this node: {error.strerror}") from None


def _model_place(name: str, config: AgentConfig) -> Path:
    models = offered(config)
    if name not in models:
        known = ", ".join(sorted(models)) or "none"
        raise Rejected("model_missing", f"model {name!r} is not among those of this node ({known})")
    return models[name]


def _check_model(order: Order, config: AgentConfig, device: DeviceProfile) -> None:
    name = order.job.model
    files, shape = read_model(name, config)
    if order.model_fingerprint not in (None, files.fingerprint):
        raise Rejected(
            "model_mismatch",
            f"the order is for model {name!r} with fingerprint {order.model_fingerprint}, this node has {files.fingerprint}; "
            "give it the same files, or submit the job again",
        )
    shortest = Rows(tokens=(2,), answers=(1,))
    make_estimate(shape, order.job, Lengths(train=shortest, score=shortest, generate=(1, 1)), calibrated(device))
