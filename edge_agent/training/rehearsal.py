"""The plan of a job by a dry run: what trains, scores and generates is done once with a model without weights, and its bytes are counted.

Layers of a decoder are alike: few of them are run, then one more, and what the second run takes more is what each further layer takes.
The peaks of the parts of a pass are kept apart, so that each of them grows evenly with the layers.

Shapes: B rows, T tokens, N answer tokens, V vocabulary, K key heads, E head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig
from transformers.cache_utils import DynamicCache

from edge_agent.job import Job, ReftOptions, Schedule
from edge_agent.training.generate import GumbelNoise, begins_once
from edge_agent.training.head import answer_logp, weighted_loss
from edge_agent.training.key_values import read_beginning, reserve
from edge_agent.training.loop import trained
from edge_agent.training.methods.method import Method
from edge_agent.training.optimizer import make_optimizer
from edge_agent.training.packing import answer_hidden, pack
from profiles.device import DeviceProfile
from quantization.adapter import attach_adapter, checkpoint_activations
from quantization.attention import TREE
from quantization.dry_run import LiveBytes, counted, ghost_model, takes_trees
from quantization.estimate import (
    CLIENT_BYTES,
    Lengths,
    best_bytes,
    estimates,
    load_bytes,
    moments_bytes,
    reft_bytes,
    with_overhead,
)
from quantization.ladder import Layout, Rows, Rung, ladder, relative_time
from quantization.load import explained
from quantization.model_files import ModelFiles
from quantization.nf4 import Kernel
from quantization.plan import NONE_MISSED, Missed, Plan, RungCost, StagePlan, Survey, make_plan, smallest
from quantization.shape import Shape, adapter_elements

FEW_LAYERS = 2
"""Layers of the smaller of the two models that are run; of layers that differ, so many times their pattern."""
Loss = Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""What is differentiated, of model, hidden states, tokens, their weights, and rows of the head at once."""


@dataclass
class Rehearsal:
    """Runs the work of a job without weights, and remembers what each of its parts took."""

    files: ModelFiles
    shape: Shape
    job: Job
    lengths: Lengths
    device: DeviceProfile
    method: Method
    padded: bool = False
    """Rows are padded although the architecture says that it could share their beginnings."""
    on_run: Callable[[], None] = lambda: None
    """Called before each of the dry runs, of which there may be dozens; what it raises ends the planning."""
    kernel: Kernel | None = None
    """What computes in 4 bits; None: what does on a processor here, and bitsandbytes elsewhere."""
    rows: Layout = field(init=False)
    rungs: list[Rung] = field(init=False)
    _config: Any = field(init=False)
    _known: dict[tuple[object, ...], dict[str, int]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        with explained(self.files, "its config.json cannot be used"):
            self._config = AutoConfig.from_pretrained(self.files.path, trust_remote_code=False, local_files_only=True)
            self.rows = "shared" if takes_trees(self._config) and not self.padded else "padded"
        has_8bit = self.kernel != "torch"  # that optimizer is of bitsandbytes, and has no other form
        self.rungs = ladder(self.job, self.shape, self.lengths.train, self.device, self.rows, has_8bit)
        self._guess_of = estimates(self.shape, self.job, self.lengths, self.device, self.rows)

    def plan(self, missed: Missed = NONE_MISSED) -> Plan:
        """Return the plan on the fastest settings that fit. Raises DoesNotFit with the smallest budget that would work."""
        return make_plan(
            self.job, self.rungs, self.rows, self._guess_of, self.lengths.score.longest, self.stages, missed, self.device.spare_bytes
        )

    def survey(self, made: Plan) -> Survey:
        """Return what else the ladder offers beside a plan."""
        guess, rungs = self._guess_of(1.0), self.rungs
        rung = smallest(rungs, guess)
        least = max(s.peak_bytes for s in self.stages(rung, 1)) + self.device.spare_bytes
        first = relative_time(self.shape, self.lengths.train, rungs[0], self.rows)
        asked = max(s.peak_bytes for s in guess(rungs[0], 1))
        costs = []
        for number in sorted({r.number for r in rungs}):
            of = smallest([r for r in rungs if r.number == number], guess)
            peak = max(s.peak_bytes for s in guess(of, 1))
            time = relative_time(self.shape, self.lengths.train, of, self.rows) / first
            costs.append(RungCost(number, of.name, peak, asked - peak, round(time, 3)))
        return Survey(made, self.device.title, tuple(costs), -(-least // 2**20) * 2**20)

    def stages(self, rung: Rung, batch: int) -> tuple[StagePlan, ...]:
        """Return the bytes of every stage on a rung, with `batch` prompts generated at once."""
        job, lengths = self.job, self.lengths
        adapter = adapter_elements(self.shape, job.lora) * 4
        score, train = self._score(rung), self._train(rung)
        base = score["held"] - adapter
        after, moments = reft_bytes(self.shape, job), moments_bytes(self.shape, job, rung)
        kept = after + best_bytes(self.shape, job, self.device)
        trained = base + adapter + moments + kept
        sample = self._generation(rung, batch, lengths.generate, sampled=True)
        evaluate = self._generation(rung, batch, lengths.generate, sampled=job.evaluation.temperature is not None)
        scored = _transient(score, "score")
        free_text = scored if job.evaluation.verifier == "none" else 0
        on_device = self.device.kind != "discrete"
        client = CLIENT_BYTES if job.judging.source == "endpoint" and on_device else 0
        found = [
            StagePlan("load", base, load_bytes(self.shape, self.device, rung, base)),
            StagePlan("evaluate", base + adapter + after, max(evaluate, free_text)),
            StagePlan("sample", base, sample),
            StagePlan("repair", base, max(scored, self._generation(rung, batch, lengths.repair)) if lengths.repair[1] else 0),
            StagePlan("judge", base, self._generation(rung, batch, lengths.judge) or client),
            StagePlan("score", base + adapter, scored),
            StagePlan("train", trained, adapter if on_device else 0, "resume"),
            StagePlan("train", trained, scored, "score"),
            *(StagePlan("train", trained, _transient(train, phase), phase) for phase in ("forward", "backward")),
            # The rehearsed update makes the moments of 32 bits itself, beside the gradients.
            StagePlan("train", trained if rung.adam_8bit else trained - moments, _transient(train, "optimizer"), "optimizer"),
            StagePlan("train", trained, 2 * (adapter + moments + kept) if on_device else 0, "checkpoint"),
            StagePlan("save", base + adapter + after, 2 * adapter if on_device else 0),
        ]
        if isinstance(job.method, ReftOptions):
            during = self._generation(rung, min(batch, job.schedule.batch), lengths.generate, sampled=True)
            found.append(StagePlan("train", trained, during, "sample"))
        return with_overhead(found, self.shape, self.device, lengths)

    def _score(self, rung: Rung) -> dict[str, int]:
        rows = min(2 * rung.micro_batch, len(self.lengths.score.tokens))
        work = partial(_score, rows=self.lengths.score, count=rows, chunk=rung.head_chunk)
        return self._run(("score", rows, rung.head_chunk), rung, work)

    def _train(self, rung: Rung) -> dict[str, int]:
        accumulates = rung.micro_batch < self.job.schedule.batch
        settings = (rung.micro_batch, rung.head_chunk, rung.checkpointing, rung.adam_8bit, rung.offload_checkpoints)
        passed = self.method.references in ("pass", "live")
        work = partial(_train, rows=self.lengths.train, rung=rung, schedule=self.job.schedule, accumulates=accumulates, passed=passed)
        losses = (_weighted, _reinforced) if isinstance(self.job.method, ReftOptions) else (_weighted,)
        found = [self._run(("train", *settings, loss), rung, partial(work, loss=loss)) for loss in losses]
        return {part: max(peaks[part] for peaks in found) for part in found[0]}

    def _generation(self, rung: Rung, batch: int, lengths: tuple[int, int], sampled: bool = False) -> int:
        if not lengths[1]:
            return 0
        asked = min(self.lengths.asked, lengths[0] - 1) if lengths == self.lengths.generate else 0
        work = partial(_generate, batch=batch, prompt=lengths[0], new=lengths[1], asked=asked)
        peaks = self._run(("generate", batch, lengths), rung, work)
        return max(_transient(peaks, "generate"), _transient(peaks, "draw") if sampled else 0)

    def _run(self, key: tuple[object, ...], rung: Rung, work: Callable[[Any, _Watch], None]) -> dict[str, int]:
        """Return the bytes that the whole model takes, of each part of the work; `held` are those of model and adapter."""
        key = (*key, rung.quantized_head, rung.embedding_on_host)
        if key not in self._known:
            text = self._config.get_text_config()
            layers = text.num_hidden_layers
            few = _pattern(getattr(text, "layer_types", None) or ()) * FEW_LAYERS
            more = few + few // FEW_LAYERS
            if layers <= more:
                self._known[key] = self._count(None, rung, work)
            else:
                first, second = self._count(few, rung, work), self._count(more, rung, work)
                self._known[key] = _of_whole(first, second, (layers - more) / (more - few))
        return self._known[key]

    def _count(self, layers: int | None, rung: Rung, work: Callable[[Any, _Watch], None]) -> dict[str, int]:
        self.on_run()
        with explained(self.files, "a pass of what its config.json says fails"):
            model = ghost_model(
                self._config, self.device, layers, _stored_type(self.files),
                quantized_head=rung.quantized_head, embedding_on_host=rung.embedding_on_host, kernel=self.kernel,
            )  # fmt: skip
            if self.rows == "shared":
                model.set_attn_implementation(TREE)
            with torch.device("meta"):
                model = attach_adapter(model, self.job.lora, 0, self.files.name)
            may_lose = "judge" in self.method.contexts
            with counted(model, self.device, may_lose) as live:
                watch = _Watch(live, model)
                live.peaks["held"] = live.now_bytes
                work(model, watch)
        return live.peaks


class _Watch:
    """Tells the count which part of a pass begins: the first layer, those in the middle, the last one, or what is outside of them."""

    def __init__(self, live: LiveBytes, model: Any) -> None:
        self._live = live
        layers = model.get_decoder().layers
        for number, layer in enumerate(layers):
            place = "first" if number == 0 else "last" if number == len(layers) - 1 else "middle"
            layer.register_forward_pre_hook(lambda *_, place=place: self._begin(place))
            layer.register_forward_hook(lambda _, __, found, place=place: self._passed(found, place))

    def begin(self, phase: str) -> None:
        self._phase = phase
        if phase in ("backward", "optimizer"):  # what the phase before has freed lay at the heap's end
            self._live.trim()
        self._begin("start")

    def _begin(self, place: str) -> None:
        self._live.begin(f"{self._phase}/{place}")

    def _passed(self, found: Any, place: str) -> None:
        hidden = found[0] if isinstance(found, tuple) else found
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._begin(place))
        if place == "last":
            self._begin("end")


def _stored_type(files: ModelFiles) -> torch.dtype:
    """Return the type of the largest weight in its file, or that of the configuration where there are no files."""
    largest = max(files.tensors, key=lambda t: t.elements, default=None)
    return torch.float32 if largest is not None and largest.stored_bytes == 4 * largest.elements else torch.bfloat16


def _transient(peaks: dict[str, int], phase: str) -> int:
    return max(size for part, size in peaks.items() if part.startswith(f"{phase}/")) - peaks["held"]


def _of_whole(first: dict[str, int], second: dict[str, int], further: float) -> dict[str, int]:
    """Return the bytes of `further` times as many layers more than `second` has more than `first`.

    Two layers have none in the middle, whose bytes grow as those of the first one or of the last, whichever grow more: before one lie the
    inputs of all layers, after the other their gradients. Scoring keeps nothing of a layer but its weights.
    """
    more = {part: second[part] - size for part, size in first.items()}
    for part in second.keys() - first.keys():
        phase = part.removesuffix("middle")
        more[part] = more["held"] if phase == "score/" else max(more[f"{phase}first"], more[f"{phase}last"])
    return {part: int(size + more[part] * further) for part, size in second.items()}


def _pattern(layer_types: Sequence[str]) -> int:
    """Return after how many layers their kinds repeat: all of them where they never do, 1 where they are not named."""
    count = len(layer_types)
    return next((n for n in range(1, count) if all(a == b for a, b in zip(layer_types, layer_types[n:], strict=False))), max(1, count))


def _rows(rows: Rows, count: int) -> list[tuple[list[int], list[int]]]:
    """Return (prompt, answer) rows of the longest lengths, alike in what they share and in nothing else."""
    made = []
    for number, (tokens, answer) in enumerate(zip(rows.tokens[:count], rows.answers, strict=False)):
        shared = min(rows.shared, tokens - 1)
        ids = [*range(shared), *(-(number + 1) for _ in range(tokens - shared))]
        cut = max(1, tokens - answer)
        made.append((ids[:cut], [*ids[cut:], 0]))  # the last token is not computed
    return made


@torch.no_grad()
def _score(model: Any, watch: _Watch, rows: Rows, count: int, chunk: int) -> None:
    watch.begin("score")
    packed = pack(model, _rows(rows, count), 0)
    answer_logp(model, answer_hidden(model, packed), packed.target_ids_N, chunk).cpu()


def _train(
    model: Any, watch: _Watch, rows: Rows, rung: Rung, schedule: Schedule, accumulates: bool, passed: bool, loss: Loss
) -> None:  # fmt: skip
    """Make one update; where it accumulates, gradients are there before."""
    parameters = list(trained(model).values())
    if rung.checkpointing:
        checkpoint_activations(model)
    model.train()
    for parameter in parameters if accumulates else []:
        parameter.grad = torch.zeros_like(parameter)
    watch.begin("forward")
    packed = pack(model, _rows(rows, rung.micro_batch), 0)
    with _offloaded() if rung.offload_checkpoints else nullcontext():
        hidden_ND = answer_hidden(model, packed)
    if passed:
        answer_logp(model, hidden_ND.detach(), packed.target_ids_N, rung.head_chunk)
    weights_N = torch.ones(len(packed.target_ids_N), device=model.device)
    total = loss(model, hidden_ND, packed.target_ids_N, weights_N, rung.head_chunk)
    watch.begin("backward")
    total.backward()
    del total, hidden_ND, packed
    watch.begin("optimizer")
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    if not rung.adam_8bit:
        make_optimizer(parameters, schedule, eight_bit=False).step()


def _weighted(model: Any, hidden_ND: torch.Tensor, ids_N: torch.Tensor, weights_N: torch.Tensor, chunk: int) -> torch.Tensor:
    """The loss of all methods but PPO (training/weighted.py)."""
    return weighted_loss(model, hidden_ND, ids_N, weights_N, weights_N, chunk).total


def _reinforced(model: Any, hidden_ND: torch.Tensor, ids_N: torch.Tensor, weights_N: torch.Tensor, chunk: int) -> torch.Tensor:
    """The loss of PPO (training/ppo.py), in what it takes: log-probabilities with a gradient, and values of the hidden states."""
    value_N = torch.nn.Linear(hidden_ND.shape[1], 1)(hidden_ND.float())[:, 0]
    total: torch.Tensor = ((answer_logp(model, hidden_ND, ids_N, chunk) + value_N) * weights_N).sum()
    return total


def _offloaded() -> saved_tensors_hooks:
    """Keep nothing for the backward pass on the device: it waits on the host, and comes back tensor by tensor."""
    return saved_tensors_hooks(lambda tensor: (tensor.shape, tensor.dtype), lambda kept: torch.empty(kept[0], dtype=kept[1]))


@torch.no_grad()
def _generate(model: Any, watch: _Watch, batch: int, prompt: int, new: int, asked: int) -> None:
    """Read what the prompts have in common, then the rest of each, then write the last token with the cache of all before it."""
    device, text = model.device, model.config.get_text_config()

    def step(tokens: int, seen: int, cache: DynamicCache) -> None:
        watch.begin("generate")
        ids_BT = torch.ones(batch, tokens, dtype=torch.long, device=device)
        mask = torch.ones(batch, seen + tokens, dtype=torch.long, device=device)
        found = model(input_ids=ids_BT, past_key_values=cache, attention_mask=mask, use_cache=True, logits_to_keep=1)
        logits_BV = found.logits[:, -1].to(copy=True, dtype=torch.float32)
        logits_BV.argmax(-1)
        watch.begin("draw")
        GumbelNoise(1.0, [0] * batch, device)(ids_BT, logits_BV)

    cache = reserve(model, batch, prompt + new)
    common = asked if begins_once(model, batch, prompt + new) else 0
    if common:
        watch.begin("generate")
        read_beginning(model, cache, [1] * common, batch)
    step(prompt - common, common, cache)
    dtype = cache.layers[0].keys.dtype
    cache = reserve(model, batch, prompt + new)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    kept_BKTE = torch.empty(batch, heads, 1, size, dtype=dtype, device=device).expand(-1, -1, prompt + new - 1, -1)
    for layer in range(text.num_hidden_layers):
        cache.update(kept_BKTE, kept_BKTE, layer)
    step(1, prompt + new - 1, cache)
