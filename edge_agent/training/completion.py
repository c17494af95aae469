"""Completes records for a method that trains on outputs: the model's own outputs, the draw among them, and judgments of the wrong ones.

The same code is two stages of a job and the command `edge-agent dataset build`. What has been generated or asked for is on disk batch by
batch, and is not done again by a later run.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.config import Endpoint
from edge_agent.critic import judge_output
from edge_agent.dataset import Record
from edge_agent.errors import JudgeMissing, RecordTooLong
from edge_agent.job import Judging, Sampling
from edge_agent.journal import Journal
from edge_agent.judging import EndpointJudge, clean_judgment
from edge_agent.prompts import Prompts
from edge_agent.report import Judgments
from edge_agent.splitting import same_question
from edge_agent.training.contexts import prompt_ids, record_ids
from edge_agent.training.generate import Batch, generate
from edge_agent.training.methods.method import Context, IsCorrect

JUDGMENT_TOKENS = 128
"""Room for a judgment that is not written yet; a longer one is cut."""
OUTPUTS, JUDGMENTS = "outputs.jsonl", "judgments.jsonl"


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What records are completed with."""

    model: Any
    tokenizer: Any
    prompts: Prompts
    sampling: Sampling
    judging: Judging
    endpoint: Endpoint | None
    is_correct: IsCorrect
    seed: int
    context_tokens: int
    contexts: tuple[Context, ...]
    """Those beside the base context that an output will be scored in, or may be; it has to leave room for them."""
    max_new_tokens: int
    """Longest output that is sampled."""
    batch: int
    directory: Path
    """Where what is done is kept for a later run of the same."""
    progress: Callable[[int, int, int], None]

    def output_room(self, record: Record) -> int:
        """Return the tokens of the longest output that may be sampled. Raises RecordTooLong."""
        return min(self.max_new_tokens, output_room(self.tokenizer, self.prompts, record, self.contexts, self.context_tokens))


def find_endpoint(judging: Judging, judges: Mapping[str, Endpoint]) -> Endpoint | None:
    """Return the endpoint that judges, None where none does. Raises JudgeMissing; ConfigInvalid or PackageMissing if it is of no use."""
    if judging.endpoint is None:
        return None
    if judging.endpoint not in judges:
        raise JudgeMissing(judging.endpoint, judges)
    endpoint = judges[judging.endpoint]
    endpoint.check()
    return endpoint


def sample_outputs(c: Completion, records: Sequence[Record]) -> tuple[list[Record], int, bool]:
    """Return the records with the model's own outputs for those that have none, how many were cut off, and whether a run had begun.

    An output that is cut off is dropped: it has no final answer to judge it by, and no end to train on. Raises RecordTooLong where
    a record leaves no room for an output.
    """
    bare = [r for r in records if r.output is None]
    room = [c.output_room(r) for r in bare for _ in range(c.sampling.outputs)]
    prompts = [record_ids(c.tokenizer, c.prompts, r) for r in bare]
    journal = Journal(c.directory / OUTPUTS, Batch)
    resumed = bool(journal.rows)
    new = generate(
        c.model, c.tokenizer, [ids for ids in prompts for _ in range(c.sampling.outputs)], max_new_tokens=room, batch=c.batch,
        progress=c.progress, temperature=c.sampling.temperature, seed=c.seed, journal=journal,
    )  # fmt: skip
    texts = c.tokenizer.batch_decode([row.ids if row.ended else [] for row in new], skip_special_tokens=True)
    return own_outputs(records, texts, c.sampling.outputs), sum(not row.ended for row in new), resumed


def output_room(tokenizer: Any, prompts: Prompts, record: Record, contexts: tuple[Context, ...], context_tokens: int) -> int:
    """Return the tokens that an output still to be written may have in all contexts that it will be scored in.

    Raises RecordTooLong where there is none.
    """
    tokens = longest_prompt(tokenizer, prompts, record, contexts)
    if tokens >= context_tokens:
        beside = " with its standard answer or a judgment" if contexts else ""
        raise RecordTooLong("dataset.jsonl", record.id, tokens + 1, context_tokens, f"question{beside} and one token more")
    return context_tokens - tokens


def longest_prompt(tokenizer: Any, prompts: Prompts, record: Record, contexts: tuple[Context, ...]) -> int:
    """Return the tokens of the longest prompt of a record in the base context and these, as far as it has their texts.

    A judgment that it has not got yet takes all the tokens that one may have.
    """
    lengths = [len(record_ids(tokenizer, prompts, record))]
    if "standard" in contexts and record.answer is not None:
        lengths.append(len(record_ids(tokenizer, prompts, record, "standard")))
    if "judge" in contexts and record.judgment is not None:
        lengths.append(len(record_ids(tokenizer, prompts, record, "judge")))
    elif "judge" in contexts:
        judged = msgspec.structs.replace(record, output=record.output or ".", judgment=".")
        lengths.append(len(record_ids(tokenizer, prompts, judged, "judge")) + JUDGMENT_TOKENS)
    return max(lengths)


def own_outputs(records: Sequence[Record], texts: Sequence[str], count: int) -> list[Record]:
    """Return the records, and for each without an output one with every distinct text of its `count` sampled ones, if it has any."""
    completed: list[Record] = []
    sampled = iter(texts)
    for record in records:
        if record.output is not None:
            completed.append(record)
            continue
        distinct = dict.fromkeys(next(sampled).strip() for _ in range(count))
        own = [
            msgspec.structs.replace(record, output=text, id=f"{str(record.id)[:240]}/{k}")
            for k, text in enumerate(filter(None, distinct), start=1)
        ]
        completed += own or [record]
    return completed


def draw(records: Sequence[Record], is_correct: IsCorrect, sampling: Sampling, seed: int) -> list[Record]:
    """Return the records with as many outputs as `sampling.per_question` and `sampling.correct_share` ask for, in their order.

    Drawn by the seed, as evenly over the questions as there are outputs. A question that would lose its last output with a standard
    answer keeps one record without: that answer may be trained on.
    """
    ranked: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    rank: Counter[tuple[str, bool]] = Counter()
    order = [i for i, r in enumerate(records) if r.output is not None]
    random.Random(f"draw/{seed}").shuffle(order)
    for i in order:
        verdict = is_correct(records[i])
        key = same_question(records[i].question), verdict
        if sampling.per_question is None or rank[key] < sampling.per_question:
            ranked[verdict].append((rank[key], i))
        rank[key] += 1
    correct, incorrect = ([i for _, i in sorted(ranked[v], key=lambda pair: pair[0])] for v in (True, False))
    most_correct, most_incorrect = _shares(len(correct), len(incorrect), sampling.correct_share)
    return _only(records, {*correct[:most_correct], *incorrect[:most_incorrect]})


def _shares(correct: int, incorrect: int, share: float | None) -> tuple[int, int]:
    """How many to keep of each kind: all of the one that is scarce, and of the other what the share asks for, one at least."""
    if share is None or (0 < share < 1 and not (correct and incorrect)):
        return correct, incorrect
    if share in (0, 1):
        return (correct, 0) if share else (0, incorrect)
    if correct * (1 - share) > incorrect * share:
        return max(1, round(incorrect * share / (1 - share))), incorrect
    return correct, max(1, round(correct * (1 - share) / share))


def _only(records: Sequence[Record], chosen: set[int]) -> list[Record]:
    """Return the chosen records, those without an output, and one without for each standard answer that would be gone."""
    there = {(r.instruction, r.question, r.answer) for i, r in enumerate(records) if i in chosen or r.output is None}
    kept = []
    for i, record in enumerate(records):
        key = record.instruction, record.question, record.answer
        if i in chosen or record.output is None:
            kept.append(record)
        elif record.answer is not None and key not in there:
            there.add(key)
            kept.append(msgspec.structs.replace(record, output=None, judgment=None))
    return kept


def judge_outputs(c: Completion, records: Sequence[Record]) -> tuple[list[Record], Judgments, bool]:
    """Return the records with a judgment for every incorrect output, who wrote them, and whether an earlier run had begun with them.

    Judgments that the chosen source does not give, because it cannot or may not, are the critic's. Raises JudgeRefused.
    """
    # An output without a standard answer is incorrect by the judgment that it has, so all open ones have an answer.
    wrong = [i for i, r in enumerate(records) if r.output is not None and not c.is_correct(r)]
    open_ = [i for i in wrong if records[i].judgment is None]
    texts, judgments, resumed = _ask(c, [records[i] for i in open_])
    completed = list(records)
    for i, text in zip(open_, texts, strict=True):
        record = records[i]
        written = _shortened(c.tokenizer, text) if text else None
        completed[i] = msgspec.structs.replace(record, judgment=written or judge_output(record.output or "", record.answer or ""))
        judgments = _counted(judgments, c.judging.source if written else "critic")
    return completed, msgspec.structs.replace(judgments, given=len(wrong) - len(open_)), resumed


def _counted(judgments: Judgments, source: str) -> Judgments:
    return msgspec.structs.replace(judgments, **{source: getattr(judgments, source) + 1})


def _ask(c: Completion, wrong: list[Record]) -> tuple[list[str | None], Judgments, bool]:
    """Return the source's judgments, None where it has none, and what they took."""
    wanted = [c.prompts.judging_messages(r.question, r.answer or "", r.output or "") for r in wrong]
    if c.judging.source == "model":
        return _ask_model(c, wanted)
    if c.judging.source == "endpoint" and c.endpoint is not None:
        judge = EndpointJudge(c.judging.endpoint or "", c.endpoint, c.directory / JUDGMENTS, c.progress)
        texts = judge.judge(wanted)
        return texts, _costs(judge), judge.resumed
    return [None] * len(wrong), Judgments(), False


def _ask_model(c: Completion, wanted: list[list[dict[str, str]]]) -> tuple[list[str | None], Judgments, bool]:
    """Let the model judge what fits its context, greedily."""
    journal = Journal(c.directory / JUDGMENTS, Batch)
    resumed = bool(journal.rows)
    prompts = [prompt_ids(c.tokenizer, messages) for messages in wanted]
    fitting = [i for i, ids in enumerate(prompts) if len(ids) + JUDGMENT_TOKENS <= c.context_tokens]
    new = generate(
        c.model, c.tokenizer, [prompts[i] for i in fitting], max_new_tokens=JUDGMENT_TOKENS, batch=c.batch, progress=c.progress,
        journal=journal,
    )  # fmt: skip
    texts = c.tokenizer.batch_decode([row.ids for row in new], skip_special_tokens=True)
    written = dict(zip(fitting, map(clean_judgment, texts), strict=True))
    return [written.get(i) for i in range(len(wanted))], Judgments(), resumed


def _costs(judge: EndpointJudge) -> Judgments:
    rows = judge.rows
    return Judgments(
        requests=sum(r.requests for r in rows), input_tokens=sum(r.input_tokens for r in rows),
        output_tokens=sum(r.output_tokens for r in rows), spent=round(sum(r.spent for r in rows), 9),
        stopped=next((r.stopped for r in rows if r.stopped), None),
    )  # fmt: skip


def _shortened(tokenizer: Any, text: str) -> str:
    """Return a judgment without the tokenizer's special tokens, cut to `JUDGMENT_TOKENS`."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= JUDGMENT_TOKENS and not set(ids) & set(tokenizer.all_special_ids):
        return text
    return str(tokenizer.decode(ids[:JUDGMENT_TOKENS], skip_special_tokens=True)).strip()
