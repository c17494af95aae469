"""The bytes of every stage in closed form, for admission: arithmetic on sizes and lengths, a millisecond and no torch.

It is what the tensors take that a stage is made of, without fragmentation: close to a dry run, and never a reason to refuse alone what a
dry run would find to fit, because a node that takes a job plans it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import msgspec

from edge_agent.job import Job, ReftOptions
from profiles.device import DeviceProfile
from quantization.ladder import Layout, Rows, Rung, ladder
from quantization.plan import Plan, StagePlan, Stages, make_plan
from quantization.shape import Shape, adapter_elements, adapter_matrices

NF4_BYTES = 4.127 / 8
"""Bytes of one weight in NF4 with double quantisation, scales included."""
SCALES_BYTES = 4 / 64
"""Bytes of a weight's scale in 32 bits while it is quantised."""
ADAM_8BIT_BYTES = 1 + 4 / 256
"""Bytes of one moment in 8 bits with the scale of its block."""
LEAST_8BIT = 4096
"""Elements of the smallest matrix whose moments have 8 bits (bitsandbytes' default)."""
LAYER_OBJECTS_BYTES, ADAPTER_OBJECTS_BYTES, PASS_OBJECTS_BYTES = 340 * 2**10, 150 * 2**10, 200 * 2**10
"""What Python's objects and the smallest blocks take on the host, of a layer, of its adapter, and of what is kept of it for the backward
pass: measured with 4, 12 and 30 layers."""
TOKEN_BYTES = 8
"""What a token of a sample takes on the host: a reference to its number."""
MARGIN = 1.035
"""What is planned, to what is counted: blocks of the heap are not filled, and what differs between runs is to lie within the plan."""
ADAPTED = ("evaluate", "score", "train", "save")
"""Stages in which the adapter is there."""
CHECKED_LOGITS = 3 * 8
"""Rows of logits that the check of a loaded model holds (quantization/load.py)."""
OF_MLP = 4
"""Vectors of the MLP's size that a decoder layer keeps per token."""
CLIENT_BYTES = 64 * 2**20
"""What the client of an endpoint takes, which counts where the budget limits the memory of the process."""


@dataclass(frozen=True)
class Lengths:
    """The longest sequences of a job, in tokens."""

    train: Rows
    """Prompts that are trained on, with their answers."""
    score: Rows
    """Prompts of all contexts with their answers."""
    generate: tuple[int, int]
    """Longest prompt to answer, and the tokens to generate after it; so the next two, 0 where nothing is generated."""
    repair: tuple[int, int] = (0, 0)
    """Longest standard context with an output."""
    judge: tuple[int, int] = (0, 0)
    """Longest request for a judgment by the model itself."""
    asked: int = 0
    """Tokens that all prompts of `generate` begin with."""
    held: int = 0
    """Tokens of all samples, in every context, with their answers."""
    text_bytes: int = 0
    """Memory of the records."""

    def shortened(self, share: float) -> Lengths:
        """Return the lengths of records that have a share of these tokens; as much is generated after them."""

        def pair(whole: tuple[int, int]) -> tuple[int, int]:
            return int(whole[0] * share), whole[1]

        def rows(whole: Rows) -> Rows:
            tokens, answers = (tuple(max(1, int(n * share)) for n in numbers) for numbers in (whole.tokens, whole.answers))
            return replace(whole, tokens=tokens, answers=answers, shared=int(whole.shared * share))

        return Lengths(
            rows(self.train),
            rows(self.score),
            pair(self.generate),
            pair(self.repair),
            pair(self.judge),
            int(self.asked * share),
            int(self.held * share),
            int(self.text_bytes * share),
        )


def model_bytes(shape: Shape, device: DeviceProfile, rung: Rung) -> int:
    """Return the bytes of a loaded model."""
    table, tables = shape.vocabulary * shape.hidden, 1 if shape.tied else 2
    other = (shape.other_elements - tables * table) * device.activation_bytes
    held = tables - (1 if rung.embedding_on_host else 0)
    stored = min(device.activation_bytes, shape.stored_element_bytes)
    return int(shape.linear_elements * NF4_BYTES + other + held * table * (NF4_BYTES if rung.quantized_head else stored))


def with_overhead(stages: Iterable[StagePlan], shape: Shape, device: DeviceProfile, lengths: Lengths) -> tuple[StagePlan, ...]:
    """Return stages with the margin, and with what they hold beside all tensors in the memory that the budget limits."""

    def objects_bytes(stage: str) -> int:
        if device.kind == "discrete":
            return 0
        adapter, samples = (ADAPTER_OBJECTS_BYTES, lengths.held * TOKEN_BYTES) if stage in ADAPTED else (0, 0)
        layer = LAYER_OBJECTS_BYTES + adapter + (PASS_OBJECTS_BYTES if stage == "train" else 0)
        return shape.layers * layer + samples + lengths.text_bytes

    def planned(s: StagePlan) -> StagePlan:
        beyond_bytes = device.beyond_bytes(s.stage)
        resident_bytes = int(MARGIN * (s.resident_bytes + objects_bytes(s.stage))) + beyond_bytes
        transient_bytes = int(MARGIN * s.transient_bytes)
        return msgspec.structs.replace(s, resident_bytes=resident_bytes, transient_bytes=transient_bytes, beyond_bytes=beyond_bytes)

    return tuple(map(planned, stages))


def load_bytes(shape: Shape, device: DeviceProfile, rung: Rung, base_bytes: int) -> int:
    """Return what loading takes beside the model of `base_bytes`.

    Weights come one by one, and a check of the whole model dequantises the largest. Those of the vocabulary come first; one that is to be
    quantised is read whole, which may be more than all of the model.
    """
    check = shape.largest_linear * device.activation_bytes + CHECKED_LOGITS * shape.vocabulary * 4
    if not rung.quantized_head:
        return check
    table, tables = shape.vocabulary * shape.hidden, 1 if shape.tied else 2
    return max(check, int(table * (tables * NF4_BYTES + shape.stored_element_bytes + SCALES_BYTES)) - base_bytes)


def moments_bytes(shape: Shape, job: Job, rung: Rung) -> int:
    """Return the bytes of the optimizer's two moments, which of small matrices have 32 bits in any case."""
    elements = adapter_matrices(shape, job.lora)
    return int(sum(n * 2 * (ADAM_8BIT_BYTES if rung.adam_8bit and n >= LEAST_8BIT else 4) for n in elements))


def reft_bytes(shape: Shape, job: Job) -> int:
    """Return what ReFT holds from its training on: the adapter of its warm-up, and its value head with two moments."""
    return (adapter_elements(shape, job.lora) + 3 * (shape.hidden + 1)) * 4 if isinstance(job.method, ReftOptions) else 0


def best_bytes(shape: Shape, job: Job, device: DeviceProfile) -> int:
    """Return what early stopping holds while it trains: the best adapter, on the host."""
    return adapter_elements(shape, job.lora) * 4 if device.kind != "discrete" and job.schedule.patience is not None else 0


def estimate(
    shape: Shape, job: Job, lengths: Lengths, device: DeviceProfile, rung: Rung, batch: int, layout: Layout
) -> tuple[StagePlan, ...]:
    """Return the bytes of every stage on a rung, with `batch` prompts generated at once."""
    act = device.activation_bytes
    adapter = adapter_elements(shape, job.lora) * 4
    base = model_bytes(shape, device, rung)
    after, moments, on_device = reft_bytes(shape, job), moments_bytes(shape, job, rung), device.kind != "discrete"
    kept = after + best_bytes(shape, job, device)
    trained = base + adapter + moments + kept

    def forward(rows: Rows, count: int, layers: float, skipped: int = 0) -> float:
        """Of so many layers everything stays for the backward pass, but of the MLP of one for so many tokens; one more layer works on a
        dequantised matrix."""
        tokens, gathered = rows.computed(count, layout), sum(rows.tokens[1:count])
        mask = max(rows.tokens[:count], default=0) * max((n - rows.shared for n in rows.tokens[:count]), default=0) * act
        layer = tokens * _layer_bytes(shape, act) + gathered * 2 * shape.query * act
        kept = layers * layer - skipped * OF_MLP * shape.mlp * act
        return kept + tokens * shape.hidden * act + mask + shape.largest_linear * act

    def head(rows: Rows, count: int, tensors: int) -> float:
        return min(rung.head_chunk, rows.predicted(count)) * shape.vocabulary * 4 * tensors

    def generation(lengths: tuple[int, int], count: int = batch, asked: int = 0) -> float:
        prompt, new = lengths
        cache = count * (prompt + new) * shape.layers * 2 * shape.key * act
        common = asked if count > 1 and layout == "shared" else 0
        read = max(common, count * (prompt - common))
        return cache + max(read * _layer_bytes(shape, act) / 2, count * shape.vocabulary * 4 * 3) if new else 0

    micro, rows = rung.micro_batch, min(2 * rung.micro_batch, max(1, len(lengths.score.tokens)))
    score = max(forward(lengths.score, rows, 0.5), head(lengths.score, rows, 2))
    inputs = 1 if rung.offload_checkpoints else shape.layers  # checkpoints that are on the device at once
    trained_tokens = lengths.train.computed(micro, layout)
    streams = inputs * trained_tokens * shape.hidden * act
    prompts = trained_tokens - lengths.train.predicted(micro) if layout == "shared" else 0  # the last layer skips them (last_layer.py)
    train = forward(lengths.train, micro, 1) + streams if rung.checkpointing else forward(lengths.train, micro, shape.layers, prompts)
    logits = head(lengths.train, micro, 4 if isinstance(job.method, ReftOptions) else 2)  # with a gradient in 32 bits in PPO
    training = max(train, train * (not rung.checkpointing) + streams * rung.checkpointing + logits)
    asked = generation(lengths.generate, asked=lengths.asked)
    client = CLIENT_BYTES if job.judging.source == "endpoint" and on_device else 0
    free_text = score if job.evaluation.verifier == "none" else 0
    during = generation(lengths.generate, min(batch, job.schedule.batch), lengths.asked)
    found: tuple[tuple[str, float, float, str], ...] = (
        ("load", base, load_bytes(shape, device, rung, int(base)), ""),
        ("evaluate", base + adapter + after, max(asked, free_text), ""),
        ("sample", base, asked, ""),
        ("repair", base, max(score, generation(lengths.repair)) if lengths.repair[1] else 0, ""),
        ("judge", base, generation(lengths.judge) or client, ""),
        ("score", base + adapter, score, ""),
        ("train", trained, score, "score"),
        ("train", trained + adapter, training, ""),  # its gradients
        ("train", trained, 2 * (adapter + moments + kept) if on_device else 0, "checkpoint"),
        *([("train", trained, during, "sample")] if isinstance(job.method, ReftOptions) else []),
        ("save", base + adapter + after, 2 * adapter if on_device else 0, ""),
    )
    return with_overhead((StagePlan(name, int(held), int(passing), phase) for name, held, passing, phase in found), shape, device, lengths)


def estimates(shape: Shape, job: Job, lengths: Lengths, device: DeviceProfile, layout: Layout) -> Callable[[float], Stages]:
    """Return what gives the bytes of every stage for records of a share of their tokens."""

    def stages_of(share: float) -> Stages:
        shorter = lengths if share == 1 else lengths.shortened(share)
        return lambda rung, batch: estimate(shape, job, shorter, device, rung, batch, layout)

    return stages_of


def make_estimate(shape: Shape, job: Job, lengths: Lengths, device: DeviceProfile, layout: Layout = "shared") -> Plan:
    """Return the plan in closed form, on the fastest settings that fit. Raises DoesNotFit with the smallest budget that would work."""
    rungs = ladder(job, shape, lengths.train, device, layout)
    return make_plan(
        job, rungs, layout, estimates(shape, job, lengths, device, layout), lengths.score.longest, spare_bytes=device.spare_bytes
    )


def _layer_bytes(shape: Shape, act: int) -> float:
    """Bytes that one decoder layer keeps per token for its backward pass, LoRA on all linear layers.

    Two norms keep their normalised inputs, in 32 bits, and their outputs, and in 32 bits of computing their inputs; attention keeps rotated
    queries, keys and values, and its output; the MLP keeps four vectors.
    """
    return (16 if act == 4 else 12) * shape.hidden + act * (3 * shape.query + 4 * shape.key + OF_MLP * shape.mlp)
