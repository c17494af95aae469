"""What a run reports: the result document, its statistics, and the events on the way. Documented field by field in docs/report.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from edge_agent.intervals import newcombe_interval, wilson_interval
from edge_agent.job import NlftOptions
from profiles.energy import EnergySource
from profiles.recorder import StageName, StageRow
from quantization.plan import Plan


class Accuracy(msgspec.Struct, frozen=True):
    """A share of correct answers with its 95 % interval: Wilson's, or by bootstrap over the questions where each has several answers."""

    value: float
    low: float
    high: float
    n: int


class Paired(msgspec.Struct, frozen=True):
    """The same questions before and after: McNemar's exact test on those whose verdict changed, and the difference of the shares.

    Where each question has several answers, its share of correct ones takes the place of the verdict, and the test is the sign test.
    """

    gained: int
    """Wrong before, correct after."""
    lost: int
    """Correct before, wrong after."""
    p_value: float
    difference: float
    """After minus before, with its 95 % interval: Newcombe's for paired shares, or by bootstrap over the questions."""
    low: float
    high: float


class PassAtK(msgspec.Struct, frozen=True):
    """The chance that one of k sampled answers is correct, with its 95 % bootstrap interval over the questions."""

    k: int
    value: float
    low: float
    high: float


class FreeText(msgspec.Struct, frozen=True):
    """How well a model writes held-out free text."""

    logp: float
    """Mean log-probability of the tokens of the reference answers, with its 95 % bootstrap interval over the records."""
    low: float
    high: float
    n: int
    tokens: int
    chrf: float
    """Corpus chrF of the greedy answers against the references (Popović 2015), 0 to 100."""


class Difference(msgspec.Struct, frozen=True):
    """After minus before, with its 95 % paired bootstrap interval over the records."""

    value: float
    low: float
    high: float


class Example(msgspec.Struct, frozen=True):
    """A held-out question with the standard answer and what the model answered before and after."""

    question: str
    answer: str
    before: str
    after: str
    correct_before: bool | None
    """None for free text."""
    correct_after: bool | None


class Measured(msgspec.Struct, frozen=True):
    """What was measured before and after training: accuracy, or for free text its own measures; a reason where nothing was held out."""

    before: Accuracy | None = None
    after: Accuracy | None = None
    paired: Paired | None = None
    reason: str | None = None
    pass_before: list[PassAtK] = []
    """Where each question has several answers: k = 2, 4, 8 and so on, and all of them."""
    pass_after: list[PassAtK] = []
    text_before: FreeText | None = None
    text_after: FreeText | None = None
    text_difference: Difference | None = None
    """Of the log-probabilities."""
    cut_off_before: int = 0
    """Outputs that had not ended at `evaluation.max_new_tokens`: a final answer may be missing only for want of room."""
    cut_off_after: int = 0


class Judgments(msgspec.Struct, frozen=True):
    """Who judged the incorrect outputs, and what an endpoint took for it."""

    given: int = 0
    """Brought by the dataset."""
    critic: int = 0
    model: int = 0
    endpoint: int = 0
    requests: int = 0
    """Sent to the endpoint, those that were tried again included."""
    input_tokens: int = 0
    output_tokens: int = 0
    spent: float = 0.0
    """In the currency of the configured prices; a request whose cost the server did not tell counts as the most it can have cost."""
    stopped: str | None = None
    """Why the endpoint was not asked for all of them."""


class Repairs(msgspec.Struct, frozen=True):
    """What became of the wrong outputs of a method that repairs them."""

    wrong: int = 0
    turning: int = 0
    """Of the wrong ones, those with a turning point."""
    repaired: int = 0
    """Of these, those that the verifier found correct; equal ones of a question are trained on once."""


class Data(msgspec.Struct, frozen=True):
    """What was trained on."""

    sha256: str
    questions: int
    """Questions trained on."""
    records: int
    """Records trained on, completed with the model's own outputs."""
    held_out: int
    correct_outputs: int
    incorrect_outputs: int
    cut_off: int
    """Sampled outputs that had not ended at `evaluation.max_new_tokens`; they are dropped."""
    repairs: Repairs
    judgments: Judgments
    samples: int
    flagged_share: float
    """Share of the answer tokens of incorrect outputs that the method makes less likely."""


class Adapter(msgspec.Struct, frozen=True):
    """The trained adapter, in `adapter/` of the job directory."""

    sha256: str
    """Of adapter_model.safetensors."""
    size_bytes: int
    parameters: int


class Model(msgspec.Struct, frozen=True):
    """The base model."""

    name: str
    fingerprint: str
    context_tokens: int


class Energy(msgspec.Struct, frozen=True):
    """What the device took in all stages of this run, but for those too short to be measured."""

    source: EnergySource = "none"
    total_j: float | None = None
    per_record_j: float | None = None
    """For each record trained on."""
    reason: str | None = None
    """Why one of them is missing."""


class Failure(msgspec.Struct, frozen=True):
    """Why a job failed: the stable code, and what, where and what to do."""

    code: str
    text: str


class Miss(msgspec.Struct, frozen=True):
    """Memory lacked although it was planned; the run went on from its checkpoint with smaller settings."""

    stage: StageName
    rung: str
    """What the plan did to fit."""
    planned_bytes: int
    """Of that stage."""
    text: str


class Change(msgspec.Struct, frozen=True):
    """Options that a job has gone on with while it ran."""

    number: int
    """Under which they were sent."""
    update: int
    """Updates that had been made with what was before."""
    method: NlftOptions


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """`result.json`: the outcome of a job."""

    version: Literal[1] = 1
    job: str
    """sha256 of the job document."""
    state: Literal["succeeded", "failed"]
    error: Failure | None = None
    method: str
    seed: int
    device: str
    versions: dict[str, str]
    model: Model | None = None
    data: Data | None = None
    plan: Plan | None = None
    misses: list[Miss] = []
    """Plans that did not hold, before the one that did."""
    kernel: Literal["bitsandbytes", "torch"] | None = None
    """What computed the model's 4-bit layers: bitsandbytes, or plain PyTorch where its kernels do not run."""
    budget_bytes: int
    peak_bytes: int
    """Largest peak of all stages, in the memory that the budget limits."""
    stages: list[StageRow] = []
    seconds: float = 0.0
    tokens_per_s: float | None = None
    """Tokens through the model per second of the train stage."""
    energy: Energy = Energy()
    updates: int = 0
    losses: list[float] = []
    """Loss of every optimizer update."""
    changes: list[Change] = []
    """Options that it has gone on with, in their order."""
    kept_update: int = 0
    """The update whose adapter was kept: the last one, or with `schedule.patience` the best."""
    development_losses: list[float] = []
    """Loss on the development records after every epoch, with `schedule.patience`."""
    accuracy: Measured | None = None
    accepted: bool | None = None
    """Whether the adapter passes the job's `accept_if`; None where nothing was measured."""
    acceptance: str | None = None
    """Why, in words."""
    examples: list[Example] = []
    adapter: Adapter | None = None
    resumed: bool = False


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """What `edge-agent dataset build` says of the dataset that it has written."""

    file: str
    sha256: str
    records: int
    questions: int
    outputs: int
    """Sampled by the model; equal, blank and cut-off ones included."""
    cut_off: int
    """Of the sampled ones those that had not ended at `evaluation.max_new_tokens`; they are dropped."""
    distinct: int
    """Outputs that the draw was made from: those given, and the sampled ones that are different, ended and not blank."""
    correct: int
    """Of the dataset's outputs."""
    incorrect: int
    judgments: Judgments
    problems: list[str]
    """What a person should know before training on it."""
    tokens: int
    """Generated by this run."""
    seconds: float
    """Of this run."""
    resumed: bool


EventKind = Literal[
    "locked_down", "stage_started", "stage_finished", "progress", "options_taken", "options_refused", "saliency_written",
    "out_of_memory", "paused", "continued", "finished", "failed", "stopped",
]  # fmt: skip


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of `events.jsonl`."""

    time: float
    """Seconds since 1970."""
    event: EventKind
    stage: StageName | None = None
    done: int | None = None
    total: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    memory_bytes: int | None = None
    budget_bytes: int | None = None
    seconds: float | None = None
    number: int | None = None
    code: str | None = None
    text: str | None = None


def wilson(correct: int, n: int) -> Accuracy | None:
    """Return the share with its 95 % Wilson score interval, or None for n = 0."""
    if n == 0:
        return None
    return Accuracy(correct / n, *wilson_interval(correct / n, n), n)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Return McNemar's exact two-sided test of the same questions before and after, and the difference of their shares."""
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    both, n = sum(after) - gained, len(after)
    interval = newcombe_interval(both, gained, lost, n - both - gained - lost)
    return Paired(gained, lost, sign_test(gained, lost), (gained - lost) / n, *interval)


def sign_test(up: int, down: int) -> float:
    """Return the exact two-sided p-value of so uneven a change, or a more uneven one, if up and down were equally likely."""
    changed, term, tail = up + down, 1, 1
    for k in range(1, min(up, down) + 1):
        term = term * (changed - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / (1 << changed))
