"""The job document: everything that determines a run, strict and declarative. It names no path but the model's, and no code."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_agent.patterns import MAX_PATTERN_BYTES, compile_pattern
from edge_agent.prompts import Prompts

Positive = Annotated[int, Meta(ge=1, le=1_000_000)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Power = Annotated[float, Meta(ge=0, le=100)]
Ratio = Annotated[float, Meta(ge=0, le=1_000_000)]
LONGEST_RUN_S = 30 * 24 * 3600
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
Alias = Annotated[str, Meta(pattern=r"^[a-z0-9-]{1,64}\Z", max_length=64)]
References = Literal["live", "epoch", "once"]
"""When the contexts are scored: right before every update, at the start of every epoch, or once with the frozen base model."""
Targets = Literal["answers", "outputs", "both"]
"""The standard answers, the correct outputs, or both."""


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Unknown keys, missing keys and wrong types are errors that name their path."""


class Dataset(Strict, frozen=True):
    """The records of a job: `dataset.jsonl` in the job directory, and `evaluation.jsonl` if the job brings its own questions."""

    sha256: Sha256
    evaluation_sha256: Sha256 | None = None
    limit: Positive | None = None
    """Train on this many questions, drawn by the seed; None for all."""


class NlftOptions(Strict, frozen=True, tag_field="name", tag="nlft"):
    """Constants of NLFT (arXiv 2412.20382, section 3), with the symbols of docs/job.md. `NlftOptions()` is our default."""

    standard_answers: bool = True
    """Train on the standard answer of a record as one more correct output."""
    repair: bool = True
    """Let the standard context write wrong outputs again from their turning point on, and train on what the verifier finds correct."""
    turning_ratio: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.1
    """The turning point is the first token y_t with c_t < turning_ratio * max_v c_t(v)."""
    references: References = "once"
    correct_threshold: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.95
    """tau: correct tokens with c > tau are scoring saliency tokens."""
    correct_boost_power: Power = 5.0
    """Exponent of the extra weight of scoring saliency tokens above tau."""
    correct_cluster_power: Power = 0.3
    """Exponent of c/tau for tokens that clustering adds."""
    correct_other_power: Power = 0.6
    """Exponent of c/tau for all other tokens."""
    judge_base_ratio: Ratio = 1.5
    """Wrong tokens are losing saliency tokens where j/b passes this, and"""
    judge_standard_ratio: Ratio = 1.5
    """where j/c passes this, and"""
    judge_minimum: Fraction = 0.01
    """where j passes this."""
    unlikelihood_scale: Ratio = 2.0
    """Factor of sigmoid(j/b - judge_base_ratio), the weight of -log(1 - b)."""
    imitate_incorrect: bool = False
    """Give unflagged tokens of wrong outputs the likelihood weight sqrt(c), as released; False trains their saliency tokens only."""
    imitate_flagged_share: Fraction = 0.06
    """No imitation of an output with a larger share of flagged tokens."""
    cluster: Literal["none", "like", "unlike"] = "none"
    """Neighbours that join the saliency tokens: with similar hidden states, or with dissimilar ones as released."""
    cluster_distance: Annotated[float, Meta(ge=0, le=2)] = 0.4
    """Threshold of 1 - cos(centre, H_k)."""
    cluster_max_span: Positive | None = 32
    """Longest walk from a saliency token, in tokens; None walks without bound, as released."""

    @classmethod
    def released(cls) -> NlftOptions:
        """Return the weights of the released code of the method, for comparison."""
        return cls(standard_answers=False, repair=False, references="live", imitate_incorrect=True, cluster="unlike", cluster_max_span=None)


class SftOptions(Strict, frozen=True, tag_field="name", tag="sft"):
    """Supervised fine-tuning: weight 1 on every token."""

    targets: Targets = "answers"


class DftOptions(Strict, frozen=True, tag_field="name", tag="dft"):
    """Dynamic Fine-Tuning (arXiv 2508.05629): weight sg(b) on every token."""

    targets: Targets = "answers"


class CutOptions(Strict, frozen=True, tag_field="name", tag="cut"):
    """Contrastive Unlikelihood Training (arXiv 2312.14591, section 4.2 and appendix A.1), with the paper's symbols."""

    standard_answers: bool = False
    """Train on the standard answer of a record as one more correct output, which the paper does not."""
    references: References = "live"
    judge_base_ratio: Annotated[float, Meta(gt=0, le=1_000_000)] = 1.1
    """lambda: tokens of incorrect outputs with j > lambda * b are made unlikely; the paper chooses 1.1 or 1.2."""
    unlikelihood_scale: Ratio = 1.0
    """alpha: factor of their weight; the paper chooses 0.25, 0.5 or 1."""
    unlikelihood_power: Power = 1.0
    """gamma: their weight is alpha * j^gamma; the paper chooses 0.25, 0.5, 1 or 2, its released code has 0."""


class ReftOptions(Strict, frozen=True, tag_field="name", tag="reft"):
    """Reinforced Fine-Tuning (arXiv 2401.08967, sections 3.1 and 4.3), with the paper's symbols and values."""

    warmup_epochs: Annotated[int, Meta(ge=0, le=1_000_000)] = 2
    """Epochs of supervised fine-tuning on the standard answers before PPO; 1 or 2 in the paper."""
    learning_rate_ratio: Annotated[float, Meta(gt=0, le=1_000_000)] = 0.03
    """Learning rate of PPO over that of the warm-up; 3e-7 over 1e-5 in the paper."""
    kl_coefficient: Ratio = 0.05
    """beta: penalty of the log-ratio to the warm-up model; 0.05 in the paper for answers in natural language."""
    gamma: Fraction = 1.0
    """Discount of later rewards."""
    gae_lambda: Fraction = 0.95
    """Decay of the generalized advantage estimate."""
    clip_range: Annotated[float, Meta(gt=0, le=1_000_000)] = 0.2
    """epsilon: how far ratio and value may move from those at sampling."""
    value_coefficient: Ratio = 5.0
    """alpha: weight of the value loss."""
    inner_updates: Annotated[int, Meta(ge=1, le=64)] = 2
    """U: updates on the answers of each step."""
    partial_reward: Fraction = 0.1
    """For an output with a final answer that is not the right one."""


class Lora(Strict, frozen=True):
    """Low-rank adapters (arXiv 2106.09685)."""

    rank: Annotated[int, Meta(ge=1, le=512)] = 16
    alpha: Annotated[float, Meta(gt=0, le=1_000_000)] = 16.0
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    targets: Literal["all", "mlp"] = "all"
    """All linear layers but the output head, or those of the MLP only (the paper's choice)."""


class Schedule(Strict, frozen=True):
    """AdamW on the adapter: linear warm-up, then cosine to zero."""

    batch: Positive = 8
    """Samples of one optimizer update; the plan may split it into micro-batches, never change it."""
    epochs: Positive = 3
    updates: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Number of optimizer updates; None for `epochs` passes over the samples."""
    learning_rate: Annotated[float, Meta(gt=0, lt=1)] = 2e-4
    warmup: Fraction = 0.1
    weight_decay: Annotated[float, Meta(ge=0, le=100)] = 0.0
    max_grad_norm: Annotated[float, Meta(gt=0, le=1_000_000)] = 1.0
    patience: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    """Stop after this many epochs without a lower loss on the development records, and keep the adapter of the lowest; None: off."""
    checkpoint_s: Annotated[float, Meta(ge=0, le=LONGEST_RUN_S)] = 60.0
    """Seconds between checkpoints at most; 0 writes one after every update."""


class Sampling(Strict, frozen=True):
    """How a record without an output gets its own worked answers, on the node, from the model itself, and which outputs are kept."""

    outputs: Annotated[int, Meta(ge=0, le=64)] = 4
    """Samples per question; equal ones count once. 0: records stay as they are."""
    temperature: Annotated[float, Meta(gt=0, le=4)] = 0.8
    per_question: Positive | None = None
    """Keep at most this many correct and this many incorrect outputs of a question; None for all."""
    correct_share: Fraction | None = None
    """Draw this share of correct outputs and the rest of incorrect ones; None keeps all."""


class Judging(Strict, frozen=True):
    """Who says what is wrong with an incorrect output that brings no judgment."""

    source: Literal["critic", "model", "endpoint"] = "critic"
    """The rule-based critic, the model itself, or an endpoint that the node's configuration names."""
    endpoint: Alias | None = None
    """Alias of the endpoint; where it is, its key and its prices are the node's to know."""

    def __post_init__(self) -> None:
        if (self.source == "endpoint") != (self.endpoint is not None):
            raise ValueError("`endpoint` belongs to the source `endpoint`, and to no other")


class Fold(Strict, frozen=True):
    """One of `of` parts of the questions that differ by one in size at most; together they are all questions."""

    fold: Annotated[int, Meta(ge=1, le=100)]
    """Counted from 1."""
    of: Annotated[int, Meta(ge=2, le=100)]

    def __post_init__(self) -> None:
        if self.fold > self.of:
            raise ValueError(f"there is no fold {self.fold} of {self.of}")


class Regex(Strict, frozen=True, tag_field="name", tag="regex"):
    """Compares what a pattern matches. The syntax is RE2's, which matches in time linear in the text."""

    pattern: Annotated[str, Meta(min_length=1, max_length=MAX_PATTERN_BYTES)]

    def __post_init__(self) -> None:
        compile_pattern(self.pattern)


Verifier = Literal["numeric", "exact", "choice", "none"] | Regex
"""How an output is held against the standard answer; `none` for free text, which has no final answer."""


class Evaluation(Strict, frozen=True):
    """What is measured before and after, on questions that are never trained on."""

    questions: Annotated[int, Meta(ge=0, le=1_000_000)] = 300
    """At most this many held-out questions."""
    held_out: Fraction | Fold = 0.2
    """Share of the questions to hold out where no evaluation file and no `limit` leaves questions over, or a fold of them."""
    development: Fraction = 0.0
    """Share of the training questions that early stopping is decided on instead; never held-out ones."""
    verifier: Verifier = "numeric"
    max_new_tokens: Positive = 256
    batch: Positive = 64
    """Questions generated at once; the plan may lower it."""
    samples: Annotated[int, Meta(ge=1, le=64)] = 1
    """Answers sampled for each question."""
    temperature: Annotated[float, Meta(gt=0, le=4)] | None = None
    """Temperature of the sampling; None for the greedy answer."""
    accept_if: Literal["not_worse", "better", "always"] = "not_worse"
    """Of the interval of the paired difference: it does not lie below 0, it lies above 0, or it may be anything."""

    def __post_init__(self) -> None:
        if self.samples > 1 and self.temperature is None:
            raise ValueError("several `samples` need a `temperature`: the greedy answer is always the same")
        if self.temperature is not None and self.verifier == "none":
            raise ValueError("free text is measured by its greedy answers; leave `temperature` out, or give a `verifier`")


class Job(Strict, frozen=True, kw_only=True):
    """One fine-tuning job. Its digest identifies the run: the same document gives the same adapter on the same machine."""

    version: Literal[1] = 1
    model: Annotated[str, Meta(min_length=1, max_length=4096)]
    """A local directory, or the id of a model in the local Hugging Face cache."""
    dataset: Dataset
    budget_bytes: Annotated[int, Meta(ge=1, le=2**53 - 1)]
    device: Literal["auto", "cpu", "cuda"] = "auto"
    method: NlftOptions | SftOptions | DftOptions | CutOptions | ReftOptions = NlftOptions()
    prompts: Literal["worked", "plain"] | Prompts = "worked"
    lora: Lora = Lora()
    schedule: Schedule = Schedule()
    sampling: Sampling = Sampling()
    judging: Judging = Judging()
    evaluation: Evaluation = Evaluation()
    seed: Seed = 42
    max_run_s: Annotated[float, Meta(gt=0, le=LONGEST_RUN_S)] = 24 * 3600.0
    """Seconds that one run may take; at the limit it checkpoints and ends."""

    @property
    def digest(self) -> str:
        """sha256 of the document in its canonical form."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()
