"""What a fine-tuning method decides: which answers are trained on, what must be scored for it, and the weight of every token.

Shapes: T answer tokens (end-of-sequence included), D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch

from edge_agent.dataset import Record

Kind = Literal["correct", "incorrect"]
Context = Literal["base", "standard", "judge"]
CONTEXTS: tuple[Context, ...] = get_args(Context)
IsCorrect = Callable[[Record], bool]
"""The verdict on the output of a record."""
Timing = Literal["live", "epoch", "once", "pass"]
"""When scores are taken: as `job.References`, without gradient and with dropout off; or in the training pass, base context only."""
OwnOutputs = Literal["before", "during", "never"]
"""When the model's own outputs are sampled: before training, for records without one; while training; or never."""


@dataclass(frozen=True)
class Target:
    """One answer to train on after the prompt of one context, and the contexts beside the base context that it is scored in.

    Where these are None it is not scored at all: its weights are constants. Where `needs_base` is false, its weights do not depend on the
    base context.
    """

    record: Record
    text: str
    kind: Kind
    contexts: tuple[Context, ...] | None = None
    prompt: Context = "base"
    needs_base: bool = True
    standard_answer: bool = False
    """The text is the record's standard answer, and not an output."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the answer's tokens in each context, and the hidden states that predict them in the base context.

    The base context of a target that is not scored is all NaN, and so is one that is left to the training pass.
    """

    base_logp_T: torch.Tensor
    standard_logp_T: torch.Tensor | None = None
    judge_logp_T: torch.Tensor | None = None
    hidden_TD: torch.Tensor | None = None


@dataclass(frozen=True)
class Weights:
    """Weights of -log p and of -log(1 - p), where p is the probability of the token in the context that it is trained in."""

    likelihood_T: torch.Tensor
    unlikelihood_T: torch.Tensor


class Method(Protocol):
    """A method is built from its options; `METHODS` names all of them."""

    needs_hidden: bool
    turning_ratio: float | None
    """Repair wrong outputs from the first token that the standard context finds this much less likely than its best; None: never."""
    references: Timing
    """When the scores behind the weights are taken."""
    trained_in: tuple[Context, ...]
    """The contexts that its targets are trained in."""
    own_outputs: OwnOutputs
    contexts: tuple[Context, ...]
    """The contexts beside the base context that it may score or train in; with "judge" among them incorrect outputs get judgments."""

    def targets(self, records: list[Record], is_correct: IsCorrect) -> list[Target]:
        """Choose what to train on."""

    def weights(self, target: Target, scores: Scores) -> Weights:
        """Weigh the tokens of a target; `scores` has the contexts that it asked for."""
