"""What `benchmarks/memory_plan.py` measures: one case in a process of its own, `python benchmarks/memory_run.py MODEL CASE`.

Prints the kernel's peak of the resident set in every phase, forgotten before each, and the set after the imports. Nothing of the planner is
in here.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from profiles.memory import close_holes
from quantization.ladder import Rung

NEW_TOKENS = 24


class Case(msgspec.Struct, frozen=True, omit_defaults=True):
    """One run: rows of `tokens` that begin with the same `shared` ones and end in answers of a quarter of them."""

    shape: str
    rung: int
    micro_batch: int
    tokens: int
    shared: int
    calibrates: bool = False

    @property
    def answer(self) -> int:
        return self.tokens // 4

    @property
    def settings(self) -> Rung:
        """Each rung with the measures that it is named for and none of those before it, so that each is measured alone."""
        return Rung(
            self.rung, self.micro_batch, 32 if self.rung == 2 else 256, self.rung == 3, adam_8bit=self.rung >= 4,
            quantized_head=self.rung >= 5,
        )  # fmt: skip


def measure(case: Case, directory: Path) -> dict[str, int]:
    """Load, score, train for one update, save it, resume from it, save the adapter and generate; return the peaks."""
    import torch

    from edge_agent.job import Lora, Schedule
    from edge_agent.training.generate import generate
    from edge_agent.training.head import weighted_loss
    from edge_agent.training.loop import trained
    from edge_agent.training.optimizer import make_optimizer
    from edge_agent.training.packing import answer_hidden, pack
    from profiles.device import device_profile
    from profiles.memory import fix_malloc, trim_heap
    from quantization.adapter import attach_adapter, checkpoint_activations
    from quantization.load import load_model, load_tokenizer
    from quantization.model_files import find_model

    fix_malloc()
    torch.manual_seed(0)
    rung, files = case.settings, find_model(str(directory))
    tokenizer = load_tokenizer(files)
    trim_heap()
    peaks = {"imports": status("VmRSS")}
    loaded = phase(peaks, "load", lambda: load_model(files, device_profile("cpu"), quantized_head=rung.quantized_head))
    adapted = attach_adapter(loaded, Lora(), 0, "model")
    beginning = torch.randint(2, 700, (case.shared,)).tolist()

    def rows(count: int) -> list[tuple[list[int], list[int]]]:
        ids = [[*beginning, *torch.randint(2, 700, (case.tokens - case.shared,)).tolist()] for _ in range(count)]
        return [(row[: -case.answer], row[-case.answer :]) for row in ids]

    phase(peaks, "score", lambda: score(adapted, rows(2 * case.micro_batch), rung.head_chunk))
    parameters, schedule = trained(adapted), Schedule()
    optimizer = make_optimizer(parameters.values(), schedule, rung.adam_8bit)
    if rung.checkpointing:
        checkpoint_activations(adapted)
    adapted.train()

    def forward(pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        packed = pack(adapted, pairs, 1)
        hidden_ND = answer_hidden(adapted, packed)
        ones_N = torch.ones(len(packed.target_ids_N))
        return weighted_loss(adapted, hidden_ND, packed.target_ids_N, ones_N, 0 * ones_N, rung.head_chunk).total

    forward([([2, 3], [4, 5])]).backward()  # so that the moments are there, as in all updates but the first
    update(parameters, optimizer)
    loss = phase(peaks, "forward", lambda: forward(rows(case.micro_batch)))
    phase(peaks, "backward", loss.backward)
    del loss
    phase(peaks, "optimizer", lambda: update(parameters, optimizer))
    save_all(peaks, adapted, parameters, optimizer)
    prompts = [prompt for prompt, _ in rows(case.micro_batch)]
    phase(peaks, "evaluate", lambda: generate(
        adapted, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch=len(prompts), progress=lambda *_: None
    ))  # fmt: skip
    return peaks


def score(adapted: Any, rows: list[tuple[list[int], list[int]]], chunk: int) -> None:
    """Score answers as NLFT does, with what the Saliency Map keeps of them."""
    import torch

    from edge_agent.saliency import SPAN
    from edge_agent.training.head import answer_logp
    from edge_agent.training.packing import answer_hidden, pack
    from edge_agent.training.saliency_scores import inner_products

    with torch.no_grad():
        packed = pack(adapted, rows, 1)
        hidden_ND = answer_hidden(adapted, packed)
        answer_logp(adapted, hidden_ND, packed.target_ids_N, chunk).cpu()
        for hidden_TD in hidden_ND.split(packed.lengths):
            inner_products(hidden_TD, SPAN)


def update(parameters: dict[str, Any], optimizer: Any) -> None:
    """Take the gradients into the parameters, and forget them."""
    import torch

    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def save_all(peaks: dict[str, int], adapted: Any, parameters: dict[str, Any], optimizer: Any) -> None:
    """Write a checkpoint, go on from it, and write the adapter."""
    from edge_agent.training.checkpoint import Progress, load_checkpoint, save_checkpoint
    from quantization.adapter import save_adapter

    with tempfile.TemporaryDirectory() as place:
        phase(peaks, "checkpoint", lambda: save_checkpoint(Path(place), parameters, optimizer, {}, Progress("key", 1)))
        optimizer.state.clear()
        phase(peaks, "resume", lambda: load_checkpoint(Path(place), parameters, optimizer, "key"))
        optimizer.state.clear()
        phase(peaks, "save", lambda: save_adapter(adapted, Path(place) / "adapter", "model"))


def phase(peaks: dict[str, int], name: str, work: Callable[[], Any]) -> Any:
    """Do a work as a stage begins, note its peak, and return what it returns."""
    close_holes()
    Path("/proc/self/clear_refs").write_text("5")
    found = work()
    peaks[name] = status("VmHWM")
    return found


def status(key: str) -> int:
    """Return the bytes of a line of the kernel's account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.stdout.write("\n" + msgspec.json.encode(measure(msgspec.json.decode(sys.argv[2], type=Case), Path(sys.argv[1]))).decode() + "\n")
