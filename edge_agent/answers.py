"""What was answered to held-out questions, and what it comes to: accuracy, pass@k, measures of free text, and whether an adapter passes.

The rows of before.jsonl and after.jsonl, and of `edge-agent evaluate --out`; they can be compared with one another at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_agent.errors import AnswersUnusable, DatasetSchema, DirectoryUnusable
from edge_agent.files import check_writable
from edge_agent.intervals import bootstrap_interval, mean_interval, pass_at_k, wilson_interval
from edge_agent.job import Verifier
from edge_agent.json_items import MAX_FILE_BYTES
from edge_agent.report import Accuracy, Difference, Example, FreeText, Measured, Paired, PassAtK, mcnemar, sign_test
from edge_agent.splitting import same_question
from edge_agent.verify import find_verifier

NOTHING_HELD_OUT = "no question was held out: give more questions, --eval-data, or larger evaluation.held_out and evaluation.questions"
ONE_TEXT = "a single held-out record of free text has no interval: hold out more"


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One held-out question with what the model answered: with verdicts, or for free text with the likelihood of the reference."""

    question: str
    answer: str
    """What the outputs are measured against: the reference of the record."""
    outputs: Annotated[list[str], Meta(min_length=1)]
    verdicts: list[bool]
    """One for each output; empty for free text."""
    tokens: int
    """Of all outputs."""
    logp: float | None = None
    """Of free text: log-probability of the whole reference."""
    reference_tokens: Annotated[int, Meta(ge=1)] | None = None
    cut_off: int = 0
    """How many of the outputs had not ended at `max_new_tokens`."""

    def __post_init__(self) -> None:
        if len(self.verdicts) not in (0, len(self.outputs)):
            raise ValueError("`verdicts` has one for each of `outputs`, or none")
        if len({bool(self.verdicts), self.logp is None, self.reference_tokens is None}) > 1:
            raise ValueError("there are `verdicts`, or `logp` and `reference_tokens`")

    @property
    def share(self) -> float:
        """Share of the outputs that are correct."""
        return sum(self.verdicts) / len(self.verdicts)


def check_answers(file: str, texts: Iterable[tuple[str | None, str | None]], verifier: Verifier) -> None:
    """Raise DatasetSchema for a text that a verifier can compare nothing with: no output would be correct. Ids come with them."""
    verify = find_verifier(verifier)
    for record, text in texts:
        if verify is not None and text is not None and not verify(text, text):
            said = f"its answer holds nothing that the verifier {msgspec.to_builtins(verifier)!r} can compare"
            raise DatasetSchema(file, f"record {record}", said)


def accuracy(answers: Sequence[Answer]) -> Accuracy | None:
    """Return the share of correct answers; None for free text, and where there is no question."""
    if not answers or not answers[0].verdicts:
        return None
    shares = [a.share for a in answers]
    return Accuracy(sum(shares) / len(shares), *_interval(shares), len(shares))


def _interval(shares: Sequence[float]) -> tuple[float, float]:
    """Wilson's interval where every question has all or nothing, else by bootstrap over the questions."""
    if {*shares} <= {0.0, 1.0}:
        return wilson_interval(sum(shares) / len(shares), len(shares))
    return mean_interval(shares, 0, 1)


def pass_at(answers: Sequence[Answer]) -> list[PassAtK]:
    """Return pass@k for k = 2, 4, 8 and so on, and for all answers of a question; pass@1 is the accuracy."""
    most = min((len(a.verdicts) for a in answers), default=0)
    ks = sorted({*(2**i for i in range(1, most.bit_length())), most} - {0, 1})
    found = []
    for k in ks:
        values = [pass_at_k(len(a.verdicts), sum(a.verdicts), k) for a in answers]
        found.append(PassAtK(k, sum(values) / len(values), *_interval(values)))
    return found


def free_text(answers: Sequence[Answer]) -> FreeText | None:
    """Return the measures of free text; None for answers with verdicts, and for a single answer, which has no interval."""
    scored = _likelihoods(answers)
    if len(scored) < 2:
        return None
    from sacrebleu.metrics.chrf import CHRF  # on use: the daemon's side imports this module

    chrf = CHRF().corpus_score([a.outputs[0] for a in answers], [[a.answer for a in answers]]).score
    logps, tokens = [logp for logp, _ in scored], [n for _, n in scored]
    return FreeText(sum(logps) / sum(tokens), *bootstrap_interval(logps, tokens), len(scored), sum(tokens), chrf)


def _likelihoods(answers: Sequence[Answer]) -> list[tuple[float, int]]:
    return [(a.logp, a.reference_tokens) for a in answers if a.logp is not None and a.reference_tokens]


def cut_off(answers: Sequence[Answer]) -> int:
    """Return how many outputs were cut off."""
    return sum(a.cut_off for a in answers)


def measure(before: Sequence[Answer], after: Sequence[Answer]) -> Measured:
    """Compare the answers to the same questions, in the same order."""
    if not before:
        return Measured(reason=NOTHING_HELD_OUT)
    if before[0].verdicts:
        return Measured(
            accuracy(before), accuracy(after), _paired(before, after), pass_before=pass_at(before), pass_after=pass_at(after),
            cut_off_before=cut_off(before), cut_off_after=cut_off(after),
        )  # fmt: skip
    if len(before) < 2:
        return Measured(reason=ONE_TEXT)
    pairs = list(zip(_likelihoods(before), _likelihoods(after), strict=True))
    gains, tokens = [after - before for (before, _), (after, _) in pairs], [n for (_, n), _ in pairs]
    difference = Difference(sum(gains) / sum(tokens), *bootstrap_interval(gains, tokens))
    return Measured(
        text_before=free_text(before), text_after=free_text(after), text_difference=difference,
        cut_off_before=cut_off(before), cut_off_after=cut_off(after),
    )  # fmt: skip


def _paired(before: Sequence[Answer], after: Sequence[Answer]) -> Paired:
    if {a.share for a in (*before, *after)} <= {0.0, 1.0}:
        return mcnemar([a.share == 1 for a in before], [a.share == 1 for a in after])
    changes = [a.share - b.share for b, a in zip(before, after, strict=True)]
    up, down = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    return Paired(up, down, sign_test(up, down), sum(changes) / len(changes), *mean_interval(changes, -1, 1))


def accept(measured: Measured, rule: Literal["not_worse", "better", "always"]) -> tuple[bool | None, str | None]:
    """Return whether an adapter passes a job's `accept_if`, and why in words; (None, None) where nothing was measured."""
    if measured.paired is not None:
        pair = measured.paired
        low, high = pair.low, pair.high
        said = f"{100 * pair.difference:+.1f} points of accuracy [{100 * low:+.1f}, {100 * high:+.1f}]"
    elif measured.text_difference is not None:
        text = measured.text_difference
        low, high = text.low, text.high
        said = f"{text.value:+.4f} nats a token [{low:+.4f}, {high:+.4f}]"
    else:
        return None, None
    if rule == "always":
        return True, f"the job accepts every adapter: {said}"
    if rule == "better":
        return low > 0, f"the interval {'lies' if low > 0 else 'does not lie'} above 0: {said}"
    return high >= 0, f"the interval {'does not lie' if high >= 0 else 'lies'} below 0: {said}"


def examples(before: Sequence[Answer], after: Sequence[Answer], count: int = 3) -> list[Example]:
    """Return a few questions before and after, those that were learned or lost first."""
    pairs = list(zip(before, after, strict=True))
    if before and before[0].verdicts:
        pairs = sorted(pairs, key=lambda p: (p[0].share == p[1].share, p[0].share))
    return [example(b, a) for b, a in pairs[:count]]


def example(before: Answer, after: Answer) -> Example:
    """Return a question with its first answers before and after."""
    verdicts = [a.verdicts[0] if a.verdicts else None for a in (before, after)]
    return Example(before.question, before.answer, before.outputs[0], after.outputs[0], verdicts[0], verdicts[1])


class Comparison(msgspec.Struct, frozen=True):
    """Two sets of answers on the questions that they share; A is called before and B after."""

    shared: int
    only_a: int
    only_b: int
    measured: Measured
    gained: list[Example]
    """Questions of which B answers more correctly than A."""
    lost: list[Example]


def compare(a: Path, b: Path, shared: bool, show: int) -> Comparison:
    """Compare two files of answers, with at most `show` examples of questions that were gained and lost.

    Questions are the same where text and reference are. Raises AnswersUnusable where a file is no such file, where one has
    verdicts and the other has none, where their tokens of free text differ, and, without `shared`, where they have different questions.
    """
    rows_a, rows_b = read_answers(a), read_answers(b)
    keys = [key for key in rows_a if key in rows_b]
    only_a, only_b = len(rows_a) - len(keys), len(rows_b) - len(keys)
    if not keys or ((only_a or only_b) and not shared):
        hint = "compare those that they share with --shared" if keys else "nothing can be compared"
        said = f"share {len(keys):,} questions; {only_a:,} are only in the first, {only_b:,} only in the second"
        raise AnswersUnusable(f"{a} and {b}", said, hint)
    before, after = [rows_a[key] for key in keys], [rows_b[key] for key in keys]
    if len({bool(row.verdicts) for row in (*before, *after)}) > 1:
        raise AnswersUnusable(f"{a} and {b}", "have verdicts in one and none in the other", "evaluate both with one verifier")
    if [row.reference_tokens for row in before] != [row.reference_tokens for row in after]:
        raise AnswersUnusable(f"{a} and {b}", "score references in other tokens", "compare models with one tokenizer")
    pairs = [pair for pair in zip(before, after, strict=True) if pair[0].verdicts]
    gained = [example(*pair) for pair in pairs if pair[1].share > pair[0].share]
    lost = [example(*pair) for pair in pairs if pair[1].share < pair[0].share]
    return Comparison(len(keys), only_a, only_b, measure(before, after), gained[:show], lost[:show])


def check_place(path: Path) -> None:
    """Raise DirectoryUnusable where answers could not be written, or would take the place of a file of anything else."""
    check_writable(path)
    if path.exists() and path.stat().st_size:
        try:
            read_answers(path)
        except AnswersUnusable:
            raise DirectoryUnusable(path, "it holds something other than answers") from None


def read_answers(path: Path) -> dict[tuple[str, str], Answer]:
    """Return the answers of a file by question and reference. Raises AnswersUnusable."""
    hint = "give a file of `edge-agent evaluate --out`, or the directory of a finished job"
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise AnswersUnusable(str(path), f"is over the limit of {MAX_FILE_BYTES:,} bytes", hint)
        rows = msgspec.json.Decoder(Answer).decode_lines(path.read_bytes())
    except OSError as error:
        raise AnswersUnusable(str(path), error.strerror or "cannot be read", hint) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise AnswersUnusable(str(path), f"holds no answers: {error}", hint) from None
    found = {(same_question(row.question), row.answer): row for row in rows}
    if len(found) < len(rows):
        raise AnswersUnusable(str(path), "has a question twice", hint)
    return found
