"""Training on the shipped model inside the test's process: the real loop on a few records, seconds instead of a whole job."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from edge_agent.dataset import Record, is_correct
from edge_agent.demo.problems import STYLES, judged_mistake, problems, render
from edge_agent.job import Judging, Lora, Sampling, Schedule
from edge_agent.prompts import PROMPTS
from edge_agent.training.completion import Completion
from edge_agent.training.contexts import Sample, encode_target
from edge_agent.training.loop import Training, optimize, trained
from edge_agent.training.methods.method import Method, Weights
from edge_agent.training.methods.nlft import Nlft
from edge_agent.training.scoring import weigh
from edge_agent.training.weighted import Weighted
from edge_agent.verify import numeric_match
from profiles.device import device_profile
from quantization.adapter import attach_adapter
from quantization.load import load_model, load_tokenizer
from quantization.model_files import find_model
from quantization.plan import Plan

SEED = 3
SMALL = Lora(rank=4)
BATCH = Schedule()


def silent(*_: object) -> None:
    """Hear progress and do nothing."""


def tiny_completion(tiny_model: Path, directory: Path, batch: int) -> Completion:
    """The shipped model in NF4 with what completes records, numbers compared."""
    torch.set_num_threads(1)
    files = find_model(str(tiny_model))
    return Completion(
        model=load_model(files, device_profile("cpu")), tokenizer=load_tokenizer(files), prompts=PROMPTS["worked"], sampling=Sampling(),
        judging=Judging(), endpoint=None, is_correct=partial(is_correct, verifier=numeric_match), seed=SEED,
        context_tokens=files.context_tokens, contexts=("standard", "judge"), max_new_tokens=120, batch=batch, directory=directory,
        progress=silent,
    )  # fmt: skip


class Killed(BaseException):
    """Ends a run like a signal: nothing on its way out writes a checkpoint."""


def kill_after(update: int) -> Any:
    """Return a listener that kills the run when the given number of updates is done."""

    def progress(done: int, total: int, tokens: int, loss: float | None, doing: str | None) -> None:
        if doing is None and done == update:
            raise Killed

    return progress


def plan(micro_batch: int = 4) -> Plan:
    return Plan("test", micro_batch, 64, False, 16, 0, ())


def judged_records(count: int, family: str = "chain") -> list[Record]:
    """Questions with one correct output in another style, and the same questions with an incorrect output and its judgment."""
    rng, records = random.Random(SEED), []
    for n, problem in enumerate(islice(problems(family, SEED), count)):
        output, judgment = judged_mistake(problem, rng)
        correct = render(problem.steps, (problem.style + 1) % STYLES)
        records.append(Record(problem.question, problem.answer, correct, id=f"{n}/1"))
        records.append(Record(problem.question, problem.answer, output, judgment, id=f"{n}/2"))
    return records


class Tiny:
    """The shipped model in NF4, loaded once; `adapted` lends it with a new adapter."""

    def __init__(self, directory: Path, quantized_head: bool = False) -> None:
        torch.set_num_threads(1)
        files = find_model(str(directory))
        self.tokenizer, self._model = load_tokenizer(files), load_model(files, device_profile("cpu"), quantized_head=quantized_head)

    @contextmanager
    def adapted(self, lora: Lora = SMALL, moved: float = 0.0) -> Iterator[Any]:
        """Lend the model with an adapter drawn from the seed; `moved` is the deviation of its second matrices, else zero."""
        model = attach_adapter(self._model, lora, SEED, "tiny")
        generator = torch.Generator().manual_seed(SEED)
        for name, parameter in trained(model).items():
            if "lora_B" in name and moved:
                parameter.data.normal_(std=moved, generator=generator)
        try:
            yield model
        finally:
            self._model = model.unload().eval()

    def samples(self, method: Method, records: list[Record]) -> list[Sample]:
        return [
            encode_target(self.tokenizer, PROMPTS["worked"], t, 2048)
            for t in method.targets(records, partial(is_correct, verifier=numeric_match))
        ]

    def training(self, method: Method, directory: Path, schedule: Schedule = BATCH, micro_batch: int = 4) -> Training:
        return Training("key", schedule, SEED, plan(micro_batch), self.tokenizer, directory, method, numeric_match, 60, 2048)

    def weights(self, model: Any, method: Method, samples: list[Sample]) -> list[Weights]:
        return weigh(model, method, samples, plan(), self.tokenizer.pad_token_id, silent)[1]

    def train(self, model: Any, samples: list[Sample], training: Training, progress: Any = silent) -> Any:
        """Run the loop on the method's objective; return where it ended, and whether it was resumed."""
        return optimize(model, self.objective(model, samples, training), training, progress)

    def objective(self, model: Any, samples: list[Sample], training: Training, kind: Any = Weighted) -> Any:
        scores, weights = weigh(model, training.method, samples, plan(), self.tokenizer.pad_token_id, silent)
        return kind(model, samples, weights, replace(training, scores=scores) if isinstance(training.method, Nlft) else training)


def adapter(model: Any) -> dict[str, torch.Tensor]:
    """Return a copy of the adapter's tensors."""
    return {name: p.detach().clone() for name, p in trained(model).items()}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Return the adapter's gradients and forget them."""
    found = {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
