"""Puts together what a run reports of its data and its environment."""

from __future__ import annotations

import platform
from importlib.metadata import version

from edge_agent.dataset import Record
from edge_agent.report import Data, Energy, Judgments, Repairs
from edge_agent.splitting import same_question
from edge_agent.training.contexts import Sample
from edge_agent.training.methods.method import IsCorrect, Weights
from profiles.energy import EnergySource
from profiles.recorder import SHORTEST_ENERGY_S, StageRow

PACKAGES = ("edge-agent", "torch", "transformers", "peft", "bitsandbytes")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that determine a result."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def describe_data(
    sha256: str, records: list[Record], cut_off: int, repairs: Repairs, judgments: Judgments, held_out: int, samples: list[Sample],
    weights: list[Weights], is_correct: IsCorrect,
) -> Data:  # fmt: skip
    """Count what was trained on."""
    verdicts = [is_correct(r) for r in records if r.output is not None]
    wrong = [w for s, w in zip(samples, weights, strict=True) if s.target.kind == "incorrect" and s.target.prompt == "base"]
    tokens = sum(len(w.unlikelihood_T) for w in wrong)
    flagged = sum(int((w.unlikelihood_T > 0).sum()) for w in wrong)
    return Data(
        sha256,
        len({same_question(s.target.record.question) for s in samples}),
        len(records),
        held_out,
        sum(verdicts),
        len(verdicts) - sum(verdicts),
        cut_off,
        repairs,
        judgments,
        len(samples),
        flagged / max(tokens, 1),
    )


def describe_energy(rows: list[StageRow], source: EnergySource, records: int) -> Energy:
    """Add up the energy of the stages; `records` were trained on, 0 where the job failed."""
    lacking = [row.energy_reason for row in rows if row.energy_j is None and row.seconds >= SHORTEST_ENERGY_S]
    measured = [row.energy_j for row in rows if row.energy_j is not None]
    if lacking or not measured:
        return Energy(source, reason=lacking[0] if lacking else "no stage was long enough")
    total_j = sum(measured)
    if records == 0:
        return Energy(source, total_j, reason="the job failed")
    if any(row.resumed for row in rows):
        return Energy(source, total_j, reason="an earlier run did a part of the work")
    return Energy(source, total_j, total_j / records)
