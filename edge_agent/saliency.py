"""The Saliency Map as data: every trained token with its log-probability in each context and its weights."""

from __future__ import annotations

from typing import Literal

import msgspec

from edge_agent.job import NlftOptions


class SaliencyRecord(msgspec.Struct, frozen=True):
    """One trained answer. All lists have one entry a token.

    `judge` is None for correct answers, `standard` where the record has no standard answer.
    """

    id: str
    """Of the record; of a standard answer, which all records of its question have, the first one's."""
    standard_answer: bool
    """The answer is the record's standard answer, and not an output."""
    kind: Literal["correct", "incorrect"]
    tokens: list[str]
    base: list[float]
    standard: list[float] | None
    judge: list[float] | None
    likelihood: list[float]
    unlikelihood: list[float]


class Saliency(msgspec.Struct, frozen=True):
    """`saliency.json`: log-probabilities and weights as scored before training, and the options that made them."""

    version: Literal[1]
    options: NlftOptions
    records: list[SaliencyRecord]
