"""Batched generation, greedy or sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import msgspec
import torch
from transformers import GenerationConfig, LogitsProcessor

from edge_agent.journal import Journal
from edge_agent.training.key_values import read_beginning, reserve
from edge_agent.training.packing import reads_trees
from quantization.attention import shortest_window


class Generated(NamedTuple):
    """What a model wrote after a prompt, and whether it ended by itself and not at the limit."""

    ids: list[int]
    ended: bool


class Batch(msgspec.Struct, frozen=True):
    """One line of a journal: what was generated for the prompts, limit, temperature and seed that `key` is a digest of."""

    key: str
    rows: list[Generated]


class GumbelNoise(LogitsProcessor):  # type: ignore[misc]
    """Turns greedy choice into sampling: the maximum of logits / temperature + Gumbel noise is a draw from the softmax.

    Every row has a generator of its own, so what is sampled for a prompt does not depend on the prompts beside it.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device) -> None:
        self._temperature = temperature
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the perturbed scores, B x V."""
        noise_BV = torch.empty_like(scores, dtype=torch.float32)
        for row_V, generator in zip(noise_BV, self._generators, strict=True):
            row_V.exponential_(generator=generator)
        return scores.float() / self._temperature - noise_BV.log()


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    batch: int,
    progress: Callable[[int, int, int], None],
    temperature: float | None = None,
    seed: int = 0,
    journal: Journal[Batch] | None = None,
    keep_end: bool = False,
) -> list[Generated]:
    """Return what was written after each prompt, with its end-of-sequence token only with `keep_end`; greedy without a temperature.

    What the prompts of a batch begin with in common is computed once.

    `max_new_tokens` is for all prompts or one for each. Prompts of like length share a batch, padded on the left. Results depend on
    prompts, limits and seed, and on `batch` by rounding only; but prompts with less room than the others share batches with one
    another, and in each the least room counts. `progress` hears (prompts done, all, tokens). Batches that `journal` has from an
    earlier run of the same are not generated again.
    """
    model.eval()
    ends = end_ids(model, tokenizer)
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    answers = [Generated([], ended=False)] * len(prompts)
    done = 0
    for number, group in enumerate(_groups(prompts, limits, batch)):
        limit = min(limits[i] for i in group)
        key = hashlib.sha256(msgspec.json.encode([[list(prompts[i]) for i in group], limit, temperature, seed])).hexdigest()
        rows = journal.rows[number].rows if journal and number < len(journal.rows) and journal.rows[number].key == key else None
        if rows is None:
            rows = _generate(model, tokenizer, [prompts[i] for i in group], limit, ends, keep_end, _noise(model, temperature, seed, group))
            if journal is not None:
                journal.cut(number)
                journal.append(Batch(key, rows))
            progress(done + len(group), len(prompts), sum(len(row.ids) for row in rows))
        done += len(group)
        for i, row in zip(group, rows, strict=True):
            answers[i] = row
    return answers


def _groups(prompts: Sequence[Sequence[int]], limits: Sequence[int], batch: int) -> list[list[int]]:
    """Return batches of prompts, longest first: those with the largest limit, then those with less."""
    most = max(limits, default=0)
    by_length = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    kinds = [i for i in by_length if limits[i] == most], [i for i in by_length if limits[i] < most]
    return [kind[start : start + batch] for kind in kinds for start in range(0, len(kind), batch)]


def _noise(model: Any, temperature: float | None, seed: int, group: Sequence[int]) -> list[GumbelNoise]:
    return [GumbelNoise(temperature, [hash((seed, i)) & 0x7FFFFFFF for i in group], model.device)] if temperature else []


def _generate(
    model: Any, tokenizer: Any, prompts: list[Sequence[int]], limit: int, ends: set[int], keep_end: bool, noise: list[GumbelNoise]
) -> list[Generated]:
    """Return what was written after the prompts of one batch."""
    config = GenerationConfig(
        max_new_tokens=limit, do_sample=False, eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id, use_cache=True
    )
    width = max(map(len, prompts))
    pads = [width - len(ids) for ids in prompts]
    common = _common(model, prompts, width + limit)
    start, pad_id = [*prompts[0][:common]], tokenizer.pad_token_id
    ids = torch.tensor([[*start, *[pad_id] * n, *ids[common:]] for n, ids in zip(pads, prompts, strict=True)], device=model.device)
    mask = torch.tensor([[1] * common + [0] * n + [1] * (width - common - n) for n in pads], device=model.device)
    cache = reserve(model, len(prompts), width + limit) if reads_trees(model) else None
    if common:
        read_beginning(model, cache, start, len(prompts))
    new = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=noise, past_key_values=cache
    )[:, width:].tolist()  # fmt: skip
    lengths = [next((t for t, token in enumerate(row) if token in ends), len(row)) for row in new]
    return [Generated(row[: length + keep_end], length < len(row)) for row, length in zip(new, lengths, strict=True)]


def begins_once(model: Any, rows: int, longest: int) -> bool:
    """Whether what a batch of rows begins with is computed once; `longest` tokens are in one of them, answer included.

    A window counts the padding between what is common and the rest; a cache that is no list of keys and values has no beginning.
    """
    window = shortest_window(model.config.get_text_config())
    return rows > 1 and reads_trees(model) and (window is None or window >= longest)


def _common(model: Any, prompts: Sequence[Sequence[int]], longest: int) -> int:
    """Return how many tokens all prompts begin with, one at least left over; 0 where the model's cache could not begin with them."""
    if not begins_once(model, len(prompts), longest):
        return 0
    first, *_, last = sorted(map(tuple, prompts))  # in lexicographic order the two with least in common
    return min(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))), min(map(len, prompts)) - 1)


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer."""
    declared = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
