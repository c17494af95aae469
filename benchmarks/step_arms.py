"""What `benchmarks/step.py` holds side by side, each in a process of its own: `python benchmarks/step_arms.py SETTINGS`.

A process makes its model, then runs one epoch for every line on standard input and answers with what it took, as a line of JSON. Where
seconds are taken, it keeps what it frees (profiles/memory.py), as a job does whose budget has room, so that no page is fetched twice. Where
memory is taken, it gives it back at once, so that what is measured is in use; that costs time, so it is another process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
import torch
from gsm8k import as_imitation, samples
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from edge_agent.job import Lora, NlftOptions, References, Schedule, SftOptions
from edge_agent.training.contexts import Sample
from edge_agent.training.loop import Training, order, trained
from edge_agent.training.methods.nlft import Nlft, token_weights
from edge_agent.training.methods.sft import Sft
from edge_agent.training.scoring import weigh
from edge_agent.training.weighted import Weighted
from profiles.device import DeviceProfile, device_profile
from profiles.memory import CudaMemory, HostMemory, Memory, fix_malloc, keep_freed
from quantization.adapter import attach_adapter, checkpoint_activations
from quantization.ladder import HEAD_CHUNK
from quantization.load import load_model
from quantization.model_files import find_model
from quantization.nf4 import use_kernel
from quantization.plan import Plan

SEED, BATCH, LEARNING_RATE = 7, 8, 2e-4
LORA = Lora(rank=16, alpha=16.0, dropout=0.0, targets="all")


class Settings(msgspec.Struct, frozen=True):
    """One process: what it runs, on which model and data."""

    arm: str
    model: str
    data: str
    device: str
    micro_batch: int
    instruction: int
    """Tokens."""
    records: int
    joined: int = 1
    """Questions in a record."""
    memory: bool = False
    """Freed memory is given back at once."""


class Epoch(msgspec.Struct, frozen=True):
    """What one epoch took. `peak_bytes` is above what the process held before it."""

    seconds: float
    peak_bytes: int
    tokens: int


class Work(NamedTuple):
    """What every arm is made of."""

    settings: Settings
    tokenizer: Any
    samples: list[Sample]
    device: str

    def batches(self) -> Iterator[list[list[Sample]]]:
        """The updates of an epoch in micro-batches, longest first."""
        for update in order(len(self.samples), Schedule(batch=BATCH, epochs=1), SEED):
            chosen = sorted((self.samples[i] for i in update), key=lambda s: -s.longest)
            yield [chosen[start : start + self.settings.micro_batch] for start in range(0, len(chosen), self.settings.micro_batch)]


def profile_of(device: str) -> DeviceProfile:
    """Return the profile of a device; `cpu-bf16` is none of jobs."""
    profile = device_profile(device.removesuffix("-bf16"))
    return msgspec.structs.replace(profile, compute_dtype="bfloat16") if device.endswith("-bf16") else profile


def ours(work: Work, method: Any, rows: list[Sample], score_only: bool = False) -> Callable[[], int]:
    """The engine: a pack a micro-batch; weights by the method, renewed when it says. An epoch is the second of a run of two."""
    s = work.settings
    model = attach_adapter(load_model(find_model(s.model), profile_of(s.device)), LORA, SEED, s.model)
    checkpoint_activations(model)
    plan = Plan("benchmark", s.micro_batch, HEAD_CHUNK, True, 1, 0, ())
    schedule = Schedule(batch=min(BATCH, len(rows)), epochs=2, learning_rate=LEARNING_RATE)
    training = Training("", schedule, SEED, plan, work.tokenizer, Path(), method, rescored=lambda _: None)
    _, weights = weigh(model, method, rows, plan, work.tokenizer.pad_token_id, lambda *_: None)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=LEARNING_RATE, weight_decay=0.0)

    def score() -> int:
        counted: list[int] = []
        weigh(model, method, rows, plan, work.tokenizer.pad_token_id, lambda done, total, tokens, *_: counted.append(tokens))
        return sum(counted)

    def epoch() -> int:
        objective, tokens = Weighted(model, rows, weights, training), 0
        for update in range(objective.updates // 2, objective.updates):
            tokens += objective.backward(update, lambda *_: None)[1]
            torch.nn.utils.clip_grad_norm_(objective.parameters.values(), schedule.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return tokens

    return score if score_only else epoch


def _plain_model(work: Work) -> Any:
    """The same model as any script loads it: transformers and bitsandbytes."""
    dtype = getattr(torch, profile_of(work.settings.device).compute_dtype)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        work.settings.model, dtype=dtype, quantization_config=nf4, device_map={"": work.device}, local_files_only=True
    )
    use_kernel(model, "bitsandbytes")
    return model


def released(work: Work) -> Callable[[], int]:
    """The scheme of the released NLFT code, written anew on the same model: three padded rows a record, all with gradient.

    A correct output takes the base row twice, as there; the softmax over the vocabulary of every row and place is kept in 32 bits. Three
    things make it faster than the released code: clusters are left out, which need hidden states as well; so is its plain likelihood; and
    its LoRA layers are the engine's.
    """
    model = attach_adapter(_plain_model(work), LORA, SEED, work.settings.model)
    checkpoint_activations(model)
    model.train()
    options, pad = NlftOptions.released(), work.tokenizer.pad_token_id
    optimizer = torch.optim.AdamW(trained(model).values(), lr=LEARNING_RATE, weight_decay=0.0)

    def micro_batch(group: list[Sample], answer_tokens: int) -> int:
        rows = [(*s.prompts[c], *s.answer) for s in group for c in ("base", "judge" if "judge" in s.prompts else "base", "standard")]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
        probabilities = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().softmax(-1)
        loss = torch.zeros((), device=model.device)
        for number, sample in enumerate(group):
            target = torch.tensor(sample.answer, device=model.device)
            base, judge, standard = (
                probabilities[3 * number + k, len(rows[3 * number + k]) - len(target) - 1 : len(rows[3 * number + k]) - 1]
                .gather(1, target[:, None])[:, 0]
                .clamp(1e-12, 1 - 1e-7)
                for k in range(3)
            )
            judged = judge.detach().log() if sample.target.kind == "incorrect" else None
            weights = token_weights(sample.target.kind, base.detach().log(), standard.detach().log(), judged, None, _unclustered(options))
            loss = loss - (weights.likelihood_T * base.log() + weights.unlikelihood_T * (1 - base).log()).sum()
        (loss / answer_tokens).backward()
        return ids.numel()

    def epoch() -> int:
        tokens = 0
        for groups in work.batches():
            answer_tokens = sum(len(s.answer) for group in groups for s in group)
            tokens += sum(micro_batch(group, answer_tokens) for group in groups)
            optimizer.step()
            optimizer.zero_grad()
        return tokens

    return epoch


def _unclustered(options: NlftOptions) -> NlftOptions:
    return msgspec.structs.replace(options, cluster="none")


class Rounds(TrainerCallback):  # type: ignore[misc]
    """Lets a trainer run one epoch at a time."""

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Wait for the next line."""
        self.measure = wait()

    def on_epoch_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Answer."""
        self.measure(0)


def trl(work: Work, patched: bool = False, **options: Any) -> None:
    """TRL's SFTTrainer on the same tokens, with the same adapter, schedule and checkpointing; runs epochs until the input ends.

    Its adapter has 16 bits also where activations have 32, and without Triton its loss takes the head of every token, prompts included.
    `patched` mends these two from outside.
    """
    import trl.trainer.utils
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = [(s.prompts["base"], s.answer) for s in work.samples]
    data = Dataset.from_list([{"input_ids": [*p, *a], "completion_mask": [0] * len(p) + [1] * len(a)} for p, a in rows])
    longest, micro_batch, model = max(len(p) + len(a) for p, a in rows), work.settings.micro_batch, _plain_model(work)
    if options.get("packing"):  # rows of a micro-batch are joined to one, whose attention grows with its square
        options["max_length"], micro_batch = micro_batch * longest, 1
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=micro_batch, num_train_epochs=1000, learning_rate=LEARNING_RATE,
        gradient_accumulation_steps=BATCH // work.settings.micro_batch, lr_scheduler_type="constant", completion_only_loss=True,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, max_grad_norm=1.0, logging_strategy="no",
        save_strategy="no", report_to="none", seed=SEED, disable_tqdm=True, optim="adamw_torch", bf16=model.dtype == torch.bfloat16,
        use_cpu=work.device == "cpu", **{"max_length": longest} | options,
    )  # fmt: skip
    lora = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=work.tokenizer, peft_config=lora, callbacks=[Rounds()])
    if patched:
        trl.trainer.utils._use_triton = lambda _: True
        for parameter in trained(trainer.model).values():
            parameter.data = parameter.data.to(model.dtype)
    trainer.train()


def _nlft(references: References) -> Nlft:
    """NLFT that makes tokens unlikely in a model with random weights as well, which prefers none by a half."""
    return Nlft(NlftOptions(references=references, judge_base_ratio=1.0, judge_standard_ratio=1.0, judge_minimum=0.0))


OURS: dict[str, Callable[[Work], Callable[[], int]]] = {
    "SFT": lambda w: ours(w, Sft(SftOptions()), [as_imitation(s) for s in w.samples]),
    "NLFT, scored live": lambda w: ours(w, _nlft("live"), w.samples),
    "NLFT, scored in each epoch": lambda w: ours(w, _nlft("epoch"), w.samples),
    "NLFT, scored before": lambda w: ours(w, _nlft("once"), w.samples),
    "scoring": lambda w: ours(w, _nlft("once"), w.samples, score_only=True),
    "released scheme": released,
}
TRL: dict[str, dict[str, Any]] = {
    "TRL": {},
    "TRL, grouped by length": {"train_sampling_strategy": "group_by_length"},
    "TRL, padding-free": {"padding_free": True, "max_length": None},
    "TRL, packed": {"packing": True},
}
"""SFTTrainer by its options. Its chunked loss, which is its default, is on in all of them."""
PATCHED: dict[str, dict[str, Any]] = {"TRL, patched": {"patched": True}}


def wait() -> Callable[[int], None]:
    """Say once that all is loaded, and wait for a line; return what answers it when the epoch is over. Ends the process with the input."""
    if not LOADED:
        LOADED.append(True)
        _say("loaded")
    if not sys.stdin.readline().strip():
        os._exit(0)
    for memory in MEMORY:
        memory.release()
    before, started = sum(m.current_bytes() for m in MEMORY), time.perf_counter()

    def answer(tokens: int) -> None:
        synchronize()
        seconds = time.perf_counter() - started
        epoch = {"seconds": seconds, "peak_bytes": sum(m.peak_bytes() for m in MEMORY) - before, "tokens": tokens}
        _say(json.dumps(epoch))

    return answer


def _say(line: str) -> None:
    ANSWERS[0].write(f"{line}\n")
    ANSWERS[0].flush()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


ANSWERS: list[IO[str]] = []
"""Where answers go: standard output, before libraries may print to it."""
LOADED: list[bool] = []
MEMORY: list[Memory] = []
"""What is measured where memory is, nothing where seconds are."""


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    ANSWERS.append(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    (fix_malloc if settings.memory else keep_freed)()
    device = "cuda:0" if settings.device == "cuda" else "cpu"
    if settings.memory:
        MEMORY.append(CudaMemory(0) if settings.device == "cuda" else HostMemory())
    tokenizer, rows = samples(
        Path(settings.data), settings.records, settings.instruction, settings.joined, NlftOptions(standard_answers=False)
    )
    work = Work(settings, tokenizer, rows, device)
    if settings.arm in TRL | PATCHED:
        trl(work, **(TRL | PATCHED)[settings.arm])
    epoch = OURS[settings.arm](work)
    while True:
        measure = wait()
        measure(epoch())


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
