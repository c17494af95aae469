"""Repairs wrong outputs: each stays as it is up to its turning point, and goes on as the model does that has read the standard answer.

NLFT (arXiv 2412.20382, section 3.3) makes those tokens of a wrong output unlikely which the judgment makes likelier than the base
context does (j/b > 1.5). That test needs b < 2/3: it never sees a mistake that the model is sure of, and most mistakes are of that
kind. Nor can unlikelihood correct one: it moves probability to whatever the model thought of next.

The standard context knows both, the place and the remedy. The turning point is the first token y_t that it refutes, by its own best
token there: log c_t < log max_v c_t(v) + log `turning_ratio`, whatever b is. Later tokens follow from the mistake; what the standard
context says of them is about a text that no right answer begins with. So the output is cut there, the best token takes the place of
y_t, and the standard context writes the rest. If the verifier finds the result correct, it is trained on as a correct output.

Shapes: N answer tokens of the rows that are read at once, or of one output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import torch

from edge_agent.dataset import Record
from edge_agent.journal import Journal
from edge_agent.report import Repairs
from edge_agent.training.completion import Completion
from edge_agent.training.contexts import Sample, answer_ids, encode_target, record_ids
from edge_agent.training.generate import Batch, end_ids, generate
from edge_agent.training.head import AnswerScores, answer_scores
from edge_agent.training.methods.method import Target
from edge_agent.training.packing import answer_hidden, pack
from edge_agent.verify import final_answer

REPAIRS = "repairs.jsonl"


Turn = Callable[[AnswerScores], int | None]
"""Finds the position of the turning point in an output by its scores in the standard context, if there is one."""


def turning_point(scores: AnswerScores, ratio: float) -> int | None:
    """Return the position of the first token that is less than `ratio` times as likely as the best one there, or None."""
    refuted = (scores.logp_N < scores.best_logp_N + math.log(ratio)).nonzero()
    return int(refuted[0]) if len(refuted) else None


@torch.no_grad()
def standard_scores(c: Completion, samples: Sequence[Sample], rows: int, chunk: int) -> list[AnswerScores]:
    """Return the scores of each sample in the standard context, on the CPU. `rows` are read at once, at most `chunk` x V logits exist."""
    c.model.eval()
    found: dict[int, AnswerScores] = {}
    longest_first = sorted(range(len(samples)), key=lambda i: -samples[i].longest)
    for start in range(0, len(samples), rows):
        group = longest_first[start : start + rows]
        packed = pack(c.model, [(samples[i].prompts["standard"], samples[i].answer) for i in group], c.tokenizer.pad_token_id)
        scores = answer_scores(c.model, answer_hidden(c.model, packed), packed.target_ids_N, chunk)
        parts = zip(*(s.cpu().split(packed.lengths) for s in scores), strict=True)
        found |= {i: AnswerScores(*of_one) for i, of_one in zip(group, parts, strict=True)}
        c.progress(min(start + rows, len(samples)), len(samples), packed.tokens)
    return [found[i] for i in range(len(samples))]


def repair_outputs(c: Completion, records: Sequence[Record], turn: Turn, rows: int, chunk: int) -> tuple[list[Record], Repairs, bool]:
    """Return the records with each wrong output that could be repaired in its repaired form, the count, and whether a run had begun.

    `rows` are scored at once. A repair counts where the verifier finds it correct and its working has changed: another final answer
    after the same working is none. A repaired output that is there already is dropped.
    """
    wrong = [i for i, r in enumerate(records) if r.output is not None and r.answer is not None and not c.is_correct(r)]
    targets = [Target(records[i], records[i].output or "", "incorrect", ("standard",)) for i in wrong]
    samples = [encode_target(c.tokenizer, c.prompts, target, c.context_tokens) for target in targets]
    turns = [(scores, turn(scores)) for scores in standard_scores(c, samples, rows, chunk)]
    begun = [None if at is None else [*s.answer[:at], int(x.best_ids_N[at])] for s, (x, at) in zip(samples, turns, strict=True)]
    texts, resumed = _continued(c, samples, begun)
    found = {i: _repaired(c, records[i], text) for i, text in zip(wrong, texts, strict=True) if text}
    repaired = {i: record for i, record in found.items() if record is not None}
    there = {_identity(r) for i, r in enumerate(records) if i not in repaired}
    completed: list[Record] = []
    for i, record in enumerate(records):
        new = repaired.get(i, record)
        if i not in repaired or _identity(new) not in there:
            there.add(_identity(new))
            completed.append(new)
    return completed, Repairs(len(wrong), sum(b is not None for b in begun), len(repaired)), resumed


def _identity(record: Record) -> tuple[str | None, ...]:
    return record.instruction, record.question, record.answer, record.output


def _continued(c: Completion, samples: Sequence[Sample], begun: Sequence[list[int] | None]) -> tuple[list[str | None], bool]:
    """Let the standard context write the rest of what is begun, greedily; None where nothing is, or there is no room for it."""
    journal = Journal(c.directory / REPAIRS, Batch)
    resumed, ends = bool(journal.rows), end_ids(c.model, c.tokenizer)
    whole = {i: ids[:-1] for i, ids in enumerate(begun) if ids and ids[-1] in ends}
    open_ = {i: [*samples[i].prompts["standard"], *ids] for i, ids in enumerate(begun) if ids and i not in whole}
    if open_:
        room = {i: min(c.max_new_tokens, c.context_tokens - len(ids)) for i, ids in open_.items()}
        fitting = [i for i in open_ if room[i] > 0]
        new = generate(
            c.model, c.tokenizer, [open_[i] for i in fitting], max_new_tokens=[room[i] for i in fitting], batch=c.batch,
            progress=c.progress, journal=journal,
        )  # fmt: skip
        whole |= {i: [*(begun[i] or []), *rest.ids][: c.max_new_tokens] for i, rest in zip(fitting, new, strict=True) if rest.ended}
    texts = {i: str(c.tokenizer.decode(ids, skip_special_tokens=True)).strip() for i, ids in whole.items()}
    return [texts.get(i) for i in range(len(samples))], resumed


def _repaired(c: Completion, record: Record, text: str) -> Record | None:
    """Return the record with the text as its output, or None where that is no repair."""
    new = msgspec.structs.replace(record, output=text, judgment=None, id=f"{str(record.id)[:240]}/repaired")
    if _working(text) == _working(record.output or "") or not c.is_correct(new):
        return None
    # As text it may have other tokens than were generated.
    tokens = len(answer_ids(c.tokenizer, text))
    fits = len(record_ids(c.tokenizer, c.prompts, new, "standard")) + tokens <= c.context_tokens
    return new if fits and tokens <= c.max_new_tokens + 1 else None


def _working(text: str) -> str:
    """Everything before the final answer: before its number, or where it has none before the last line."""
    number = final_answer(text)
    head = text.rpartition(number)[0] if number else text.strip().rpartition("\n")[0]
    return " ".join(head.split())
