"""Measures a model on held-out questions by real generation, and on free text by the likelihood of its references too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge_agent.answers import Answer
from edge_agent.dataset import Record, Verify
from edge_agent.errors import RecordTooLong
from edge_agent.job import Evaluation
from edge_agent.prompts import Prompts
from edge_agent.training.contexts import Sample, answer_ids, record_ids
from edge_agent.training.generate import Generated, generate
from edge_agent.training.methods.method import Target
from edge_agent.training.scoring import score
from edge_agent.verify import find_verifier
from quantization.ladder import HEAD_CHUNK


def evaluate(
    model: Any, tokenizer: Any, held_out: list[Record], prompts: Prompts, evaluation: Evaluation, *, batch: int, context_tokens: int,
    progress: Callable[[int, int, int], None], seed: int = 0, rows: int = 4, chunk: int = HEAD_CHUNK,
) -> list[Answer]:  # fmt: skip
    """Answer every held-out question, greedily or by `evaluation.samples` samples, and verify the answers.

    Free text is answered greedily and its references are scored, `rows` at once, at most `chunk` x V logits in memory. Raises
    RecordTooLong where a question or its reference does not fit the model's context.
    """
    if not held_out:
        return []
    ids = [record_ids(tokenizer, prompts, r) for r in held_out]
    longest = max(ids, key=len)
    if len(longest) >= context_tokens:
        record = held_out[ids.index(longest)].id
        raise RecordTooLong("evaluation questions", record, len(longest) + 1, context_tokens, "question and one token more")
    verify = find_verifier(evaluation.verifier)
    scored = None if verify else _references(tokenizer, held_out, ids, context_tokens)
    new = generate(
        model, tokenizer, [row for row in ids for _ in range(evaluation.samples)],
        max_new_tokens=[min(evaluation.max_new_tokens, context_tokens - len(row)) for row in ids for _ in range(evaluation.samples)],
        batch=batch, progress=progress, temperature=evaluation.temperature, seed=seed,
    )  # fmt: skip
    texts = tokenizer.batch_decode([row.ids for row in new], skip_special_tokens=True)
    places = [slice(n * evaluation.samples, (n + 1) * evaluation.samples) for n in range(len(held_out))]
    if verify is not None:
        return [_verified(r, texts[s], new[s], verify) for r, s in zip(held_out, places, strict=True)]
    found = dict(score(model, scored or [], rows, chunk, tokenizer.pad_token_id, lambda done, total, _: progress(done, total, 0)))
    likelihoods = [(x.base_logp_T.double().sum().item(), len(x.base_logp_T)) for _, x in sorted(found.items())]
    return [
        Answer(r.question, r.reference or "", texts[s], [], _tokens(new[s]), *likelihood, cut_off=_cut_off(new[s]))
        for r, s, likelihood in zip(held_out, places, likelihoods, strict=True)
    ]


def _verified(record: Record, outputs: list[str], new: list[Generated], verify: Verify) -> Answer:
    reference = record.reference or ""
    verdicts = [verify(output, reference) for output in outputs]
    return Answer(record.question, reference, outputs, verdicts, _tokens(new), cut_off=_cut_off(new))


def _tokens(new: list[Generated]) -> int:
    return sum(len(row.ids) for row in new)


def _cut_off(new: list[Generated]) -> int:
    return sum(not row.ended for row in new)


def _references(tokenizer: Any, held_out: list[Record], ids: list[list[int]], context_tokens: int) -> list[Sample]:
    """Return the references of free text after their questions."""
    samples = []
    for record, prompt in zip(held_out, ids, strict=True):
        text = record.reference or ""
        sample = Sample(Target(record, text, "correct"), tuple(answer_ids(tokenizer, text)), {"base": tuple(prompt)})
        if sample.longest > context_tokens:
            raise RecordTooLong("evaluation questions", record.id, sample.longest, context_tokens, "question with its reference")
        samples.append(sample)
    return samples
