"""Lengths of a dataset's texts in tokens of a model, whose weights are not read."""

from __future__ import annotations

import sys
from typing import Any

from edge_agent.dataset import Record
from edge_agent.dataset_check import Tokens, find, lengths, spread
from edge_agent.prompts import PROMPTS
from edge_agent.training.completion import longest_prompt
from edge_agent.training.contexts import contexts_of
from edge_agent.training.methods.method import Context
from quantization.load import load_tokenizer
from quantization.model_files import find_model


def token_lengths(records: list[Record], model: str) -> Tokens:
    """Return the lengths of all texts, and which records do not fit the model's context. Raises ModelMissing, ModelUnsupported."""
    files = find_model(model)
    tokenizer = load_tokenizer(files)
    tokenizer.model_max_length = sys.maxsize  # what is too long is reported here, not warned of on the way
    longest = [longest_context(tokenizer, record) for record in records]
    return Tokens(
        model=model,
        context_tokens=files.context_tokens,
        texts=lengths(records, lambda texts: _counts(tokenizer, texts)),
        longest_context=spread(longest),
        too_long=find(r for r, tokens in zip(records, longest, strict=True) if tokens > files.context_tokens),
    )


def longest_context(tokenizer: Any, record: Record) -> int:
    """Return the tokens of the longest prompt of a record with the longer of its answer and output, end-of-sequence included.

    A record without an output also takes a judgment, of the one that is to be written.
    """
    contexts: tuple[Context, ...] = ("standard", "judge") if record.output is None else contexts_of(record)
    texts = [text for text in (record.answer, record.output) if text]
    return longest_prompt(tokenizer, PROMPTS["worked"], record, contexts) + max(_counts(tokenizer, texts)) + 1


def _counts(tokenizer: Any, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]] if texts else []
