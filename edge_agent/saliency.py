"""The Saliency Map as data: every trained token with its log-probability in each context and its weights."""

from __future__ import annotations

from typing import Literal

import msgspec

from edge_agent.job import NlftOptions

MAX_TOKENS = 200_000
"""Of all scorings in one file; each takes some 70 bytes a token."""
MAX_PRODUCTS_BYTES = 8 * 2**20
"""Of inner products in one file, before base64."""
SPAN = 32
"""Inner products are kept with so many states before each, whatever the job clusters by."""


class Rescored(msgspec.Struct, frozen=True):
    """Log-probabilities of the same tokens with the adapter as it was in an epoch, counted from 1."""

    epoch: int
    base: list[float]
    standard: list[float] | None
    judge: list[float] | None


class SaliencyRecord(msgspec.Struct, frozen=True):
    """One trained answer. All lists of numbers have one entry a token.

    `judge` and `judgment` are None for correct answers, `standard` and `answer` where the record has no standard answer.
    """

    id: str
    """Of the record; of a standard answer, which all records of its question have, the first one's."""
    standard_answer: bool
    """The answer is the record's standard answer, and not an output."""
    kind: Literal["correct", "incorrect"]
    question: str
    answer: str | None
    judgment: str | None
    tokens: list[str]
    """Together they are the text of the answer."""
    base: list[float]
    standard: list[float] | None
    judge: list[float] | None
    likelihood: list[float]
    unlikelihood: list[float]
    products: bytes | None
    """Inner products of the hidden states that clusters are made of: for each token those with its own state, the one before, and so on,
    as little-endian 32-bit numbers, rows of one length. None where the file has no room for them."""
    rescored: list[Rescored]
    """Later scorings, where the job's references are not taken once."""


class Saliency(msgspec.Struct, frozen=True):
    """`saliency.json`: log-probabilities and weights as scored before training, and the options that made them."""

    version: Literal[1]
    options: NlftOptions
    left_out: int
    """Trained answers that the file has no room for."""
    records: list[SaliencyRecord]
