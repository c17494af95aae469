"""The plan: how many bytes each stage of a job takes before anything is loaded, and on which rung of the ladder it fits the budget.

How the bytes are found is given: in closed form (quantization/estimate.py), or by a dry run of the real code. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import msgspec

from edge_agent.errors import DoesNotFit
from edge_agent.job import Job
from quantization.ladder import Layout, Rung

SEARCH_STEPS = 10
"""Halvings in the search for the longest record that fits."""
GUESS_TOLERANCE = 1.2
"""A closed form that is over the budget by more than this factor is not worth a dry run."""
GENERATING = {"evaluate", "sample", "repair", "judge"}
"""Stages that generate as a whole."""
ROOM = 4
"""Of what comes and goes in a stage the multiple that a process on the host may take where it keeps what it frees: holes of the heap, up
to 3.6 times as measured."""


class StagePlan(msgspec.Struct, frozen=True):
    """Bytes of one stage, or of one phase of it: what stays and what comes and goes."""

    stage: str
    resident_bytes: int
    transient_bytes: int
    phase: str = ""
    """Of the stage `train` sample, score, forward, backward, optimizer, checkpoint or resume; empty where a stage is planned as a whole."""
    beyond_bytes: int = 0
    """Of the resident ones those that nothing counts: the device's overhead, as it was known when this was planned."""

    @property
    def peak_bytes(self) -> int:
        return self.resident_bytes + self.transient_bytes

    @property
    def roomy_bytes(self) -> int:
        """The peak where the process keeps what it frees."""
        return self.resident_bytes + ROOM * self.transient_bytes

    @property
    def generates(self) -> bool:
        """Whether a smaller batch of generation helps."""
        return self.stage in GENERATING or (self.stage, self.phase) == ("train", "sample")

    @property
    def name(self) -> str:
        """Stage and phase, for people."""
        return f"{self.stage}: {self.phase}" if self.phase else self.stage


class Plan(msgspec.Struct, frozen=True):
    """The chosen rung and the bytes of every stage on it, the device's overhead included."""

    rung: str
    micro_batch: int
    head_chunk: int
    checkpointing: bool
    generate_batch: int
    budget_bytes: int
    stages: tuple[StagePlan, ...]
    number: int = 0
    """Of the rung, from 0 (as asked) to 7."""
    adam_8bit: bool = False
    quantized_head: bool = False
    embedding_on_host: bool = False
    offload_checkpoints: bool = False
    rows: Layout = "shared"
    keeps_freed: bool = False
    """The process keeps what it frees, which is faster on a processor: the budget has room for it."""

    @property
    def roomy_bytes(self) -> int:
        """The peak where the process keeps what it frees."""
        return max(s.roomy_bytes for s in self.stages)

    @property
    def peak_bytes(self) -> int:
        return self.binding.peak_bytes

    @property
    def binding(self) -> StagePlan:
        """The stage that needs most."""
        return max(self.stages, key=lambda s: s.peak_bytes)

    @property
    def vocabulary(self) -> dict[str, bool]:
        """How embedding and output head are held."""
        return {"quantized_head": self.quantized_head, "embedding_on_host": self.embedding_on_host}

    def beyond_bytes(self, stage: str) -> int:
        """Return what a stage was planned with beyond all that can be counted, 0 for one that is not planned."""
        return max((s.beyond_bytes for s in self.stages if s.stage == stage), default=0)

    def planned_bytes(self, stage: str) -> int | None:
        """Return what a stage may take, None for one that is not planned."""
        return max((s.roomy_bytes if self.keeps_freed else s.peak_bytes for s in self.stages if s.stage == stage), default=None)


class RungCost(msgspec.Struct, frozen=True):
    """The smallest settings of one rung, by arithmetic."""

    number: int
    rung: str
    peak_bytes: int
    saves_bytes: int
    """Less than as asked."""
    relative_time: float
    """Of training, as asked being 1."""


class Survey(msgspec.Struct, frozen=True):
    """A plan, and what else the ladder offers."""

    plan: Plan
    device: str
    rungs: tuple[RungCost, ...]
    smallest_budget_bytes: int
    """Of the smallest settings, by a dry run; rounded up to MiB."""


Missed = Mapping[str, int]
"""Of stages that lacked memory in an earlier run the bytes that were planned: less has to be planned now."""
NONE_MISSED: Missed = MappingProxyType({})
Stages = Callable[[Rung, int], tuple[StagePlan, ...]]
"""The bytes of every stage on a rung, with so many prompts generated at once."""


def generate_batches(job: Job) -> Iterator[int]:
    """Yield the numbers of questions to generate at once, from the one asked for down to 1."""
    batch = job.evaluation.batch
    while batch > 1:
        yield batch
        batch = -(-batch // 2)
    yield 1


def plan_on(rung: Rung, batch: int, budget_bytes: int, layout: Layout, stages: Stages) -> Plan:
    """Return the plan of one rung, whether or not it fits."""
    return Plan(
        rung.name, rung.micro_batch, rung.head_chunk, rung.checkpointing, batch, budget_bytes, stages(rung, batch), rung.number,
        rung.adam_8bit, rung.quantized_head, rung.embedding_on_host, rung.offload_checkpoints, layout,
    )  # fmt: skip


def choose(
    job: Job, rungs: Sequence[Rung], layout: Layout, stages: Stages, guess: Stages, missed: Missed = NONE_MISSED, spare_bytes: int = 0
) -> Plan | None:
    """Return the plan of the first rung that fits, with the most questions at once that fit on it; None where none fits.

    A generation that does not fit gets a smaller batch of its own, and never changes the training. What `guess` finds far over the budget
    is not looked at. `spare_bytes` of the budget are left to what is not planned.
    """
    room_bytes = job.budget_bytes - spare_bytes
    for rung in rungs:
        for batch in generate_batches(job):
            over = _over(guess(rung, batch), room_bytes, tolerance=GUESS_TOLERANCE)
            if not over:
                plan = plan_on(rung, batch, job.budget_bytes, layout, stages)
                over = _over(plan.stages, room_bytes, missed)
                if not over:
                    return plan
            if not all(stage.generates for stage in over):
                break
    return None


def _over(stages: Sequence[StagePlan], room_bytes: int, missed: Missed = NONE_MISSED, tolerance: float = 1.0) -> list[StagePlan]:
    """Return the stages, and phases of them, that do not fit; what can be counted of them may pass its room by a factor."""

    def is_over(s: StagePlan) -> bool:
        counted_bytes, left_bytes = s.peak_bytes - s.beyond_bytes, room_bytes - s.beyond_bytes
        return counted_bytes > tolerance * left_bytes or s.peak_bytes >= missed.get(s.stage, math.inf)

    return [s for s in stages if is_over(s)]


def smallest(rungs: Sequence[Rung], guess: Stages) -> Rung:
    """Return the rung that needs least."""
    return min(rungs, key=lambda rung: sorted((s.peak_bytes for s in guess(rung, 1)), reverse=True))


def make_plan(
    job: Job, rungs: Sequence[Rung], layout: Layout, guess_of: Callable[[float], Stages], longest_tokens: int, stages: Stages | None = None,
    missed: Missed = NONE_MISSED, spare_bytes: int = 0,
) -> Plan:  # fmt: skip
    """Return the plan on the fastest settings that fit. Raises DoesNotFit with the smallest budget that would work.

    `guess_of` gives the bytes in closed form for records of a share of their tokens, the longest of which has `longest_tokens`; `stages`
    the exact ones for all tokens, where they are known. `spare_bytes` of the budget are left to what is not planned.
    """
    guess = guess_of(1.0)
    made = choose(job, rungs, layout, stages or guess, guess, missed, spare_bytes)
    if made is not None:
        return made
    rung = smallest(rungs, guess)
    least = plan_on(rung, 1, job.budget_bytes, layout, stages or guess)
    guessed = plan_on(rung, 1, job.budget_bytes, layout, guess)
    low, high = 0.0, 1.0
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        shorter = plan_on(rung, 1, job.budget_bytes, layout, guess_of(middle))
        fits = shorter.peak_bytes * least.peak_bytes / guessed.peak_bytes <= job.budget_bytes - spare_bytes
        low, high = (middle, high) if fits else (low, middle)
    raise DoesNotFit(least.peak_bytes + spare_bytes, job.budget_bytes, least.binding.stage, int(low * longest_tokens))
