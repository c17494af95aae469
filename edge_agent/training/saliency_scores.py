"""What the Saliency Map needs of a run: inner products of hidden states, scores taken again while training, and the file itself.

Shapes: T answer tokens, D hidden size, P inner products kept of a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import torch

from edge_agent.errors import DiskFull
from edge_agent.files import write_file
from edge_agent.job import NlftOptions
from edge_agent.job_directory import JobDirectory
from edge_agent.saliency import MAX_PRODUCTS_BYTES, MAX_TOKENS, SPAN, Rescored, Saliency, SaliencyRecord
from edge_agent.training.contexts import Sample
from edge_agent.training.methods.method import CONTEXTS, Scores, Weights
from edge_agent.training.slots import Slots

BLOCK = 64
"""Hidden states that are widened to 32 bits at once."""
TEXT_WINDOW = 8
"""Tokens before one that its text may depend on."""
MAP_PAUSE_S = 10.0
"""Between two writings of the map while a run trains."""


def recorded(samples: Sequence[Sample]) -> int:
    """Return how many samples, from the first one on, a file has room for."""
    total = 0
    for number, sample in enumerate(samples):
        total += len(sample.answer)
        if total > MAX_TOKENS:
            return number
    return len(samples)


def product_spans(samples: Sequence[Sample], options: NlftOptions) -> list[int]:
    """Return with how many states before it each state of a sample is to be multiplied, for the first samples, as there is room.

    As far as the walks of the job's own options go, `SPAN` at least.
    """
    lengths = [len(sample.answer) for sample in samples[: recorded(samples)]]
    longest = max(lengths, default=0)
    walk = min(options.cluster_max_span or longest, longest)
    wanted = {"none": SPAN, "like": walk, "unlike": 2 * walk}[options.cluster]
    span = max(SPAN, min(wanted, MAX_PRODUCTS_BYTES // (4 * max(1, sum(lengths))) - 1))
    spans: list[int] = []
    room = MAX_PRODUCTS_BYTES
    for length in lengths:
        own = min(span, length - 1)
        room -= 4 * length * (own + 1)
        if room < 0:
            break
        spans.append(own)
    return spans


def inner_products(hidden_TD: torch.Tensor, span: int) -> torch.Tensor:
    """Return the products of each state with itself and the `span` states before it, T x (span + 1), on the CPU; 0 before the first."""
    length = len(hidden_TD)
    products_TP = torch.zeros(length, span + 1)
    for rows in range(0, length, BLOCK):
        later_BD = hidden_TD[rows : rows + BLOCK].float()
        for columns in range(rows, max(-1, rows - span - BLOCK), -BLOCK):
            product_BB = (later_BD @ hidden_TD[columns : columns + BLOCK].float().T).cpu()
            row_B1 = torch.arange(rows, rows + product_BB.shape[0])[:, None]
            back_BB = row_B1 - torch.arange(columns, columns + product_BB.shape[1])
            near_BB = (back_BB >= 0) & (back_BB <= span)
            products_TP[row_B1.expand_as(back_BB)[near_BB], back_BB[near_BB]] = product_BB[near_BB]
    return products_TP


class Products:
    """Inner products of the hidden states of samples, before training: on disk, because only the end of the run needs them."""

    def __init__(self, directory: Path, samples: Sequence[Sample], options: NlftOptions) -> None:
        self._spans = product_spans(samples, options)
        lengths = (4 * len(sample.answer) * (span + 1) for sample, span in zip(samples, self._spans, strict=False))
        self._slots = Slots(directory / "products.bin", lengths)

    def add(self, sample: int, hidden_TD: torch.Tensor) -> None:
        """Keep what there is room for of a sample. Raises DiskFull."""
        if sample < len(self._spans):
            self._slots.write(sample, _packed(inner_products(hidden_TD, self._spans[sample])))

    def flush(self) -> None:
        """Wait until all are on disk."""
        self._slots.flush()

    def of(self, sample: int) -> bytes | None:
        """Return those of a sample, T x (span + 1) little-endian 32-bit numbers; None where there was no room."""
        return self._slots.read(sample) if sample < len(self._spans) else None


class Rescorings:
    """Scores that are taken again while training: on disk at once, and of so many epochs, evenly chosen, as the file has room for."""

    def __init__(self, directory: Path, samples: Sequence[Sample], epochs: int) -> None:
        self._samples = recorded(samples)
        tokens = [len(sample.answer) for sample in samples[: self._samples]]
        room = MAX_TOKENS // max(1, sum(tokens)) - 1
        chosen = sorted({epochs - epochs * n // room for n in range(room)}) if room < epochs else range(1, epochs + 1)
        self._turns = {epoch: turn for turn, epoch in enumerate(chosen)}
        self._slots = Slots(directory / "rescored.bin", (4 * length for length in tokens for _ in CONTEXTS))
        self.added = 0
        """How often some were kept."""

    def add(self, scored: Sequence[tuple[int, int, Scores]]) -> None:
        """Keep (epoch, number of the sample, scores), of each context once it is scored; told again, kept again. Raises DiskFull."""
        kept = [(epoch, sample, scores) for epoch, sample, scores in scored if epoch in self._turns and sample < self._samples]
        if not kept:
            return
        for epoch, sample, scores in kept:
            for n, logp_T in enumerate((scores.base_logp_T, scores.standard_logp_T, scores.judge_logp_T)):
                if logp_T is not None and not logp_T.isnan().any():
                    self._slots.write(sample * len(CONTEXTS) + n, _packed(logp_T), self._turns[epoch])
        self._slots.flush()
        self.added += 1

    def of(self, sample: int) -> list[Rescored]:
        """Return the scores of a sample, by epoch."""
        found = []
        for epoch, turn in self._turns.items():
            base, standard, judge = (_numbers(self._slots.read(sample * len(CONTEXTS) + n, turn)) for n in range(len(CONTEXTS)))
            if base is not None:
                found.append(Rescored(epoch, base, standard, judge))
        return found


def _packed(numbers: torch.Tensor) -> bytes:
    return numbers.float().numpy().tobytes()


def _numbers(numbers: torch.Tensor | bytes | None) -> list[float] | None:
    """Return numbers of 32 bits with the nine digits that are all they have."""
    if numbers is None:
        return None
    values = torch.frombuffer(bytearray(numbers), dtype=torch.float32) if isinstance(numbers, bytes) else numbers
    return [float(f"{value:.9g}") for value in values.tolist()]


class SaliencyParts:
    """What a run keeps on disk for `saliency.json`, and the file made of it."""

    def __init__(self, directory: Path, samples: Sequence[Sample], options: NlftOptions, epochs: int) -> None:
        self._samples, self._options = samples, options
        self.products, self.rescorings = Products(directory, samples, options), Rescorings(directory, samples, epochs)

    def file(self, tokenizer: Any, scores: list[Scores], weights: list[Weights]) -> Iterator[bytes]:
        """Yield the file a record at a time: as numbers they take several times the memory of their text."""
        count = recorded(self._samples)
        yield msgspec.json.encode(Saliency(1, self._options, len(self._samples) - count, [])).removesuffix(b"]}")
        for number, sample in enumerate(self._samples[:count]):
            s, w, target = scores[number], weights[number], sample.target
            record = SaliencyRecord(
                id=target.record.id or "", standard_answer=target.standard_answer, kind=target.kind,
                question=target.record.question, answer=target.record.answer,
                judgment=target.record.judgment if target.kind == "incorrect" else None,
                tokens=token_texts(tokenizer, sample.answer),
                base=_numbers(s.base_logp_T) or [], standard=_numbers(s.standard_logp_T), judge=_numbers(s.judge_logp_T),
                likelihood=_numbers(w.likelihood_T) or [], unlikelihood=_numbers(w.unlikelihood_T) or [],
                products=self.products.of(number), rescored=self.rescorings.of(number),
            )  # fmt: skip
            yield b"," * (number > 0) + msgspec.json.encode(record)
        yield b"]}"


class LiveMap:
    """Writes `saliency.json` while a run trains, when somebody looks: they put a file into its directory, which goes when it is done."""

    def __init__(
        self, directory: JobDirectory, parts: SaliencyParts, contents: Callable[[], Iterator[bytes]], emit: Callable[..., Any]
    ) -> None:
        """`contents` makes the file of `parts`; `emit` tells events."""
        self._directory, self._parts, self._contents, self._emit = directory, parts, contents, emit
        self._written: tuple[int, float] | None = None

    def look(self) -> None:
        """Write it where it is asked for, not more often than `MAP_PAUSE_S`; where nothing has been added, only say so.

        A disk that does not take it leaves the run alone: who looks sees what was written last.
        """
        wanted, now = self._directory.saliency_wanted, time.monotonic()
        if not wanted.exists() or (self._written and now - self._written[1] < MAP_PAUSE_S):
            return
        added = self._parts.rescorings.added
        with suppress(DiskFull, OSError):
            wanted.unlink(missing_ok=True)
            if self._written is None or self._written[0] != added:
                self._written = self._written and (self._written[0], now)
                write_file(self._directory.saliency, self._contents(), private=True)
            self._written = added, time.monotonic()
            self._emit("saliency_written", stage="train")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to the one before it.

    A tokenizer may write a token otherwise at the beginning of a text, and a character may be spread over tokens: it belongs to its last.
    """
    texts: list[str] = []
    start, told = 0, ""  # the text from `start` on
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            texts.append("")
            continue
        texts.append(text[len(told) :])
        told = text
        if end - start >= 2 * TEXT_WINDOW:
            start = end - TEXT_WINDOW
            told = tokenizer.decode(ids[start:end])
    return texts
