"""What exports, chats and merges say: `export.json`, `merge.json`, the replies of `edge-agent chat --json`.

Documented field by field in docs/adapters.md.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from edge_agent.report import Accuracy, Adapter, FreeText, Measured, Model

EXPORT_REPORT, MERGE_REPORT = "export.json", "merge.json"
Format = Literal["merged", "adapter", "gguf"]
Base = Literal["stored", "nf4"]
Method = Literal[
    "cat", "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
]  # fmt: skip
"""As PEFT's `add_weighted_adapter` names them."""


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """`export.json`: what was written, and of what."""

    version: Literal[1] = 1
    format: Format
    model: Model
    """The base model."""
    adapter_sha256: str
    """Of the weights of the adapter."""
    base: Base | None = None
    """Which weights of the base model the adapter was added to; null: none were."""
    dtype: str | None = None
    """Of the weights that were written."""
    difference: float | None = None
    """How far the merged model's logits are from those of base and adapter, |a - b| / |b|, on a fixed text: what rounding makes."""
    files: list[str]
    size_bytes: int
    peak_bytes: int
    """Largest resident memory of the process on the way."""
    seconds: float


class Said(msgspec.Struct, frozen=True):
    """One answer."""

    text: str
    tokens: int
    ended: bool
    """By itself, and not at `max_new_tokens`."""
    seconds: float


class Replies(msgspec.Struct, frozen=True):
    """What was answered to a question."""

    question: str
    base: Said
    adapter: Said | None
    """null: there is no adapter."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that was merged."""

    name: str
    """As it was given."""
    sha256: str
    """Of its weights."""
    questions: int | None
    """Trained on, where its report tells it."""
    weight: float
    """Its share of the merge; all together are 1."""
    fingerprint_known: bool
    """Whether a report tells which base model it was trained on."""


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """One model on the held-out questions, and the merged adapter against it: before is this one, after the merged one."""

    name: str
    """`base`, or a part."""
    accuracy: Accuracy | None
    text: FreeText | None
    merged: Measured


class Merge(msgspec.Struct, frozen=True, kw_only=True):
    """`merge.json`: how adapters were merged, and what that gave."""

    version: Literal[1] = 1
    model: Model
    method: Method
    density: float | None
    """Share of the numbers that TIES and DARE keep."""
    seed: int
    """Of what DARE drops."""
    rank: int
    """Of the merged adapter."""
    parts: list[Part]
    adapter: Adapter
    held_out: int
    """Questions that all were measured on; 0: nothing was measured."""
    accuracy: Accuracy | None
    """Of the merged adapter."""
    text: FreeText | None
    against: list[Held]
    """The base model, then every part."""
    seconds: float
