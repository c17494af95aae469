"""Prompts and answers as token ids.

Prompt and answer are tokenised separately and concatenated, so the answer's ids are the same in every context.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from edge_agent.dataset import Record
from edge_agent.errors import RecordTooLong
from edge_agent.prompts import Prompts
from edge_agent.training.methods.method import Context, Target

TODAY = datetime(2024, 7, 26)
"""The date in templates that print one, always the same: a job must give the same prompts on every day."""

# For base models that ship no chat template.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}"
    "{{ {'system': '', 'user': 'Question: ', 'assistant': 'Answer: '}[m.role] + m.content + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Answer: {% endif %}"
)

_known: dict[int, int] = {}
"""One object for each token of the vocabulary that has been seen: a tokenizer makes a new one, of 28 bytes, wherever it occurs."""
MARKS = ("\ue000", "\ue001")
"""Stand for the texts of system and user while a template is rendered."""


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Return the token ids of a chat prompt up to where the assistant's answer begins.

    Uses the tokenizer's own chat template. Where a template refuses or drops the system role, the system text opens the user message.
    Control tokens belong to the template alone: a text that spells one, such as a forged turn, is tokenised as plain text. Raises
    jinja2.TemplateError where the template is broken.
    """
    texts = [m["content"] for m in messages]
    control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if not any(token in text for token in control for text in texts):
        return _ids(tokenizer, _prompt(tokenizer, messages))
    ids: list[int] = []
    marked = [{"role": m["role"], "content": mark} for m, mark in zip(messages, MARKS, strict=True)]
    for part in re.split(f"([{''.join(MARKS)}])", _prompt(tokenizer, marked)):
        ids += _ids(tokenizer, texts[MARKS.index(part)], plain=True) if part in MARKS else _ids(tokenizer, part)
    return ids


def _ids(tokenizer: Any, text: str, plain: bool = False) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
    return [_known.setdefault(number, number) for number in ids]


def _prompt(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    system, user = messages
    text = ""
    with suppress(TemplateError):
        text = _render(tokenizer, messages)
    if system["content"].strip() not in text:
        text = _render(tokenizer, [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}])
    return text


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    text: str = tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False, strftime_now=TODAY.strftime
    )
    return text


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of an answer, the end-of-sequence token included."""
    return [*_ids(tokenizer, text, plain=True), tokenizer.eos_token_id]


def record_ids(tokenizer: Any, prompts: Prompts, record: Record, context: Context = "base") -> list[int]:
    """Return the token ids of a record's prompt in a context. Of the text that the context shows the record must have one."""
    shown: dict[Context, dict[str, Any]] = {"base": {}, "standard": {"answer": record.answer}, "judge": {"judgment": record.judgment}}
    return prompt_ids(tokenizer, prompts.messages(record.question, instruction=record.instruction, **shown[context]))


def contexts_of(record: Record) -> tuple[Context, ...]:
    """Return the contexts beside the base context that a record has the text for."""
    having: tuple[tuple[Context, str | None], ...] = (("standard", record.answer), ("judge", record.judgment))
    return tuple(context for context, text in having if text is not None)


@dataclass(frozen=True)
class Sample:
    """A target as token ids: the prompt of every context, and the answer, whose ids are the same after each of them."""

    target: Target
    answer: tuple[int, ...]
    prompts: dict[Context, tuple[int, ...]]

    @property
    def longest(self) -> int:
        """Tokens of the longest context with the answer."""
        return max(map(len, self.prompts.values())) + len(self.answer)


def encode_target(tokenizer: Any, prompts: Prompts, target: Target, limit: int) -> Sample:
    """Return a target as token ids. Raises RecordTooLong where a context with the answer passes `limit` tokens."""
    record = target.record
    contexts = (target.prompt,) if target.contexts is None else (target.prompt, "base", *target.contexts)
    ids = {c: tuple(record_ids(tokenizer, prompts, record, c)) for c in dict.fromkeys(contexts)}
    sample = Sample(target, tuple(answer_ids(tokenizer, target.text)), ids)
    if sample.longest > limit:
        longest = max(ids, key=lambda c: len(ids[c]))
        raise RecordTooLong("dataset.jsonl", record.id, sample.longest, limit, f"{longest} context with its answer")
    return sample
