"""Whether a node takes an offer: arithmetic on what is declared, without torch and before any side effect."""

from __future__ import annotations

from datetime import datetime

from edge_agent.config import AgentConfig
from edge_agent.errors import JudgeMissing, human_bytes
from edge_agent.job import Job
from edge_agent.messages import MAX_INLINE_BYTES, File, Offer, Reason
from profiles.calibration import calibrated
from profiles.device import DeviceProfile
from quantization.estimate import Lengths, make_estimate
from quantization.ladder import Rows
from quantization.model_files import find_model
from quantization.shape import read_shape


class Rejected(Exception):
    """An offer is not taken; `reason` is its code on the wire."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def check_offer(offer: Offer, config: AgentConfig, device: DeviceProfile, waiting: int, draining: bool, now: datetime) -> None:
    """Raise Rejected, or the EdgeAgentError that a run of this job would raise, where the node does not take the offer.

    Does not cover what only a tokenizer can tell: the plan is a lower bound, with records of one token.
    """
    job = offer.job
    if offer.expires is not None and offer.expires < now:
        raise Rejected("expired", f"the offer expired at {offer.expires.isoformat()}; submit the job again")
    if draining:
        raise Rejected("draining", "the node takes no new jobs; `resume` it, or choose another")
    if waiting >= config.queue:
        raise Rejected("busy", f"{waiting} jobs wait already, the limit of this node; wait, or choose another node")
    _check_files(offer, config)
    if job.budget_bytes > config.budget:
        asked, lent = human_bytes(job.budget_bytes), human_bytes(config.budget)
        raise Rejected("oom_predicted", f"the job's budget is {asked}, this node lends {lent}; submit it with a smaller --budget")
    if job.model not in config.models:
        known = ", ".join(sorted(config.models)) or "none"
        raise Rejected("model_missing", f"model {job.model!r} is not among those of this node ({known})")
    alias = job.judging.endpoint
    if alias is not None and alias not in config.judges:
        raise Rejected("judge_missing", str(JudgeMissing(alias, config.judges)))
    if job.device not in ("auto", device.torch_device):
        raise Rejected("device_missing", f"the job asks for {job.device}, this node has {device.torch_device}")
    _check_plan(job, config, device)


def _check_files(offer: Offer, config: AgentConfig) -> None:
    wanted = {"dataset": offer.job.dataset.sha256, "evaluation": offer.job.dataset.evaluation_sha256}
    inline = 0
    for name, sha256 in wanted.items():
        file: File | None = getattr(offer, name)
        if (file.sha256 if file else None) != sha256:
            raise Rejected("dataset_checksum", f"the job names {name} {sha256}, the offer brings {file.sha256 if file else None}")
        if file is not None and file.size_bytes > config.dataset_limit:
            size, limit = human_bytes(file.size_bytes), human_bytes(config.dataset_limit)
            raise Rejected("dataset_too_large", f"{name} has {size}, the limit of this node is {limit}; split it")
        inline += len(file.inline or b"") if file else 0
    if inline > MAX_INLINE_BYTES:
        raise Rejected(
            "dataset_too_large", f"{inline:,} bytes of files inside the offer, at most {MAX_INLINE_BYTES:,}; send them in blocks"
        )


def _check_plan(job: Job, config: AgentConfig, device: DeviceProfile) -> None:
    try:
        shape = read_shape(find_model(str(config.models[job.model])))
    except OSError as error:
        raise Rejected("model_missing", f"model {job.model!r} cannot be read on this node: {error.strerror}") from None
    shortest = Rows(tokens=(2,), answers=(1,))
    make_estimate(shape, job, Lengths(train=shortest, score=shortest, generate=(1, 1)), calibrated(device))
