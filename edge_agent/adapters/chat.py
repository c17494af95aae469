"""`edge-agent chat`: asks the base model and the adapter the same question, by the path on which held-out questions are measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from edge_agent.adapters.report import Replies, Said
from edge_agent.adapters.source import Source, base_model, find_source
from edge_agent.errors import JobSchema, RecordTooLong
from edge_agent.job import Evaluation
from edge_agent.prompts import PROMPTS, Prompts
from edge_agent.training.contexts import prompt_ids
from edge_agent.training.enforce import capped
from edge_agent.training.generate import generate
from edge_agent.training.prepare import usable_profile
from edge_agent.training.reporter import Reporter, memory_explained
from profiles.memory import fix_malloc
from quantization.adapter import load_adapter
from quantization.cache import find_cache
from quantization.load import load_model, load_tokenizer
from quantization.model_files import ModelFiles, find_model

CHAT_SEED = 42


class Settings(msgspec.Struct, frozen=True):
    """What answers depend on beside model, adapter and question."""

    prompts: Prompts
    max_new_tokens: int
    temperature: float | None
    device: str
    budget_bytes: int | None
    seed: int = CHAT_SEED


def settings_of(
    source: Source | None, prompts: str | None, max_new_tokens: int | None, temperature: float | None, device: str | None,
    budget_bytes: int | None,
) -> Settings:  # fmt: skip
    """Return what is given, else what the job says, else the defaults of a job. Raises JobSchema."""
    job = source.job if source else None
    chosen = prompts or (job.prompts if job else "worked")
    if isinstance(chosen, str) and chosen not in PROMPTS:
        raise JobSchema("--prompts", f"there is no set {chosen!r}; choose of {', '.join(PROMPTS)}")
    evaluation = job.evaluation if job else Evaluation()
    return Settings(
        PROMPTS[chosen] if isinstance(chosen, str) else chosen,
        max_new_tokens or evaluation.max_new_tokens,
        temperature,
        device or (job.device if job else "auto"),
        budget_bytes or (job.budget_bytes if job else None),
    )


@contextmanager
def chat(place: Path | None, model: str | None, settings: Callable[[Source | None], Settings]) -> Iterator[Callable[[str], Replies]]:
    """Lend what answers questions with the model in 4 bits, and with the adapter at a place if there is one.

    Each question is asked by itself: models here are trained on single ones. With a budget the process may take no more. Raises
    AdapterMismatch, ModelMissing, OutOfMemory.
    """
    source = find_source(place) if place else None
    wanted = settings(source)
    files = base_model(source, model) if source else find_model(model or "")
    fix_malloc()
    device = usable_profile(wanted.device)
    limits = nullcontext()
    if wanted.budget_bytes is not None:
        limits = capped(device, wanted.budget_bytes, Reporter(device, lambda event: None, lambda: False))  # type: ignore[assignment]
    vocabulary: Mapping[str, bool] = source.vocabulary if source else MappingProxyType({})
    with limits, memory_explained(lambda: "evaluate"):
        tokenizer, loaded = load_tokenizer(files), load_model(files, device, cache=find_cache(), **vocabulary)
        if source is not None:
            loaded = load_adapter(loaded, source.adapter)

        def ask(question: str) -> Replies:
            ids = _ids(tokenizer, question, wanted, files)
            with loaded.disable_adapter() if source else nullcontext():
                base = _answer(loaded, tokenizer, ids, wanted, files)
            return Replies(question, base, _answer(loaded, tokenizer, ids, wanted, files) if source else None)

        yield ask


def _ids(tokenizer: Any, question: str, wanted: Settings, files: ModelFiles) -> list[int]:
    """Return the prompt, as records have it. Raises RecordTooLong."""
    ids = prompt_ids(tokenizer, wanted.prompts.messages(question))
    if len(ids) >= files.context_tokens:
        raise RecordTooLong("chat", "asked", len(ids) + 1, files.context_tokens, "question and one token more")
    return ids


def _answer(model: Any, tokenizer: Any, ids: list[int], wanted: Settings, files: ModelFiles) -> Said:
    began = time.monotonic()
    [new] = generate(
        model, tokenizer, [ids], max_new_tokens=min(wanted.max_new_tokens, files.context_tokens - len(ids)), batch=1,
        progress=lambda *_: None, temperature=wanted.temperature, seed=wanted.seed,
    )  # fmt: skip
    [text] = tokenizer.batch_decode([new.ids], skip_special_tokens=True)
    return Said(text, len(new.ids), new.ended, time.monotonic() - began)
