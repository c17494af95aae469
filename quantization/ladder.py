"""The ladder: settings that trade time for bytes, in the order in which a planner tries them. Imports no torch.

None of them changes the effective batch, the learning rate or the epochs, and no record is cut. Up to number 3, and at 6 and 7, the result
stays the same beyond rounding; 4 and 5 quantise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal

from edge_agent.job import Job
from profiles.device import DeviceProfile
from quantization.shape import Shape

HEAD_CHUNK, SMALL_HEAD_CHUNK = 256, 32
"""Rows of the output head that are computed at once."""
DEQUANTISE_TOKENS = 20
"""Dequantising a matrix takes as long as the products of this many tokens with it: from 7 (640 x 640) to 82 (8,192 x 2,048) on one core."""
Layout = Literal["shared", "padded"]
"""Rows of a micro-batch: what they have in common at their beginning computed once, or each whole and padded."""


@dataclass(frozen=True)
class Rows:
    """The longest rows of a kind, longest first, as many as a pack may have; all begin with the same `shared` tokens."""

    tokens: tuple[int, ...]
    answers: tuple[int, ...]
    """Tokens of the longest answers, longest first."""
    shared: int = 0

    @property
    def longest(self) -> int:
        return max(self.tokens, default=0)

    def computed(self, count: int, layout: Layout = "shared") -> int:
        """Return the tokens that a pack of the longest rows computes, padding included."""
        rows = self.tokens[:count]
        if layout == "padded":
            return len(rows) * self.longest
        return self.shared + sum(n - self.shared for n in rows)

    def predicted(self, count: int) -> int:
        """Return the answer tokens of a pack."""
        return sum(self.answers[:count])


@dataclass(frozen=True)
class Rung:
    """Settings of one run. Its number is that of the last measure it takes."""

    number: int
    micro_batch: int
    head_chunk: int = HEAD_CHUNK
    checkpointing: bool = False
    adam_8bit: bool = False
    quantized_head: bool = False
    embedding_on_host: bool = False
    offload_checkpoints: bool = False

    @property
    def name(self) -> str:
        """What it does to fit, for people."""
        done = [
            text
            for text, taken in (
                (f"micro-batch {self.micro_batch}", True),
                (f"head chunks of {self.head_chunk}", self.head_chunk < HEAD_CHUNK),
                ("activation checkpointing", self.checkpointing),
                ("8-bit Adam", self.adam_8bit),
                ("head and embedding in NF4", self.quantized_head),
                ("embedding on the host", self.embedding_on_host),
                ("checkpoints on the host", self.offload_checkpoints),
            )
            if taken
        ]
        return "as asked" if self.number == 0 else ", ".join(done)


def ladder(
    job: Job, shape: Shape, rows: Rows, device: DeviceProfile, layout: Layout = "shared", has_8bit: bool = True
) -> list[Rung]:  # fmt: skip
    """Return the rungs in the order in which they are tried: those that change no result first, and the fastest of each kind first.

    `has_8bit`: there is an optimizer with moments in 8 bits; without it the rungs above do without.
    """
    found: list[Rung] = []
    for level in _levels(shape, device, has_8bit):
        rungs = [_rung(level, job.schedule.batch, shape.tied, has_8bit, *of) for of in _schedules(job.schedule.batch, offloads=level == 7)]
        found += sorted(rungs, key=lambda r: (relative_time(shape, rows, r, layout), r.number, -r.micro_batch))
    return found


def _levels(shape: Shape, device: DeviceProfile, has_8bit: bool) -> Iterator[int]:
    yield from (3, 4, 5) if has_8bit else (3, 5)
    if not shape.tied:  # the output head needs the whole matrix
        yield 6
    if device.kind == "discrete":
        yield 7


def _schedules(batch: int, offloads: bool) -> Iterator[tuple[int, int, bool]]:
    """Yield what exact measures offer: micro-batch, head chunk, checkpointing."""
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    for micro_batch in sizes:
        for head_chunk in (HEAD_CHUNK, SMALL_HEAD_CHUNK):
            for checkpointing in (True,) if offloads else (False, True):
                yield micro_batch, head_chunk, checkpointing


def _rung(level: int, batch: int, tied: bool, has_8bit: bool, micro_batch: int, head_chunk: int, checkpointing: bool) -> Rung:
    exact = 3 if checkpointing else 2 if head_chunk < HEAD_CHUNK else 1 if micro_batch < batch else 0
    return Rung(
        exact if level == 3 else level, micro_batch, head_chunk, checkpointing,
        adam_8bit=has_8bit and level >= 4, quantized_head=level >= 5, embedding_on_host=level >= 6 and not tied,
        offload_checkpoints=level == 7,
    )  # fmt: skip


def relative_time(shape: Shape, rows: Rows, rung: Rung, layout: Layout = "shared") -> float:
    """Return the arithmetic of one sample's training on a rung; ratios of it are ratios of time, as far as arithmetic decides.

    A token costs a forward and a backward product with every frozen weight, and with checkpointing one more forward product, but for the
    last matrix of every layer (fused.py); every pass dequantises. Does not cover attention, the adapter, what the last layer skips, norms
    after the MLP, for which that last product is made, and transfers between host and device (rungs 6 and 7).
    """
    count = max(1, min(rung.micro_batch, len(rows.tokens)))
    tokens, answers = rows.computed(count, layout), rows.predicted(count)
    again = max(0, shape.linear_elements - shape.layers * shape.mlp * shape.hidden) if rung.checkpointing else 0
    layers = (2 * shape.linear_elements + again) * (tokens + DEQUANTISE_TOKENS)
    widths = DEQUANTISE_TOKENS * ceil(answers / rung.head_chunk) if rung.quantized_head else 0
    head = 2 * shape.vocabulary * shape.hidden * (answers + widths)
    return (layers + head) / count
