"""Batched generation: what prompts have in common is computed once, and changes nothing of what is written."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from edge_agent.training.generate import generate
from edge_agent.training.key_values import Room, reserve
from edge_agent.training.packing import reads_trees
from quantization.load import read_trees
from tests.test_trees import OTHERS, SHAPES
from tests.tiny_training import Tiny, silent


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Tiny:
    return Tiny(tiny_model)


class Tokens:
    """The ids of a tokenizer that has no texts."""

    eos_token_id, pad_token_id = 2, 0


def _prompts(common: int, count: int) -> list[list[int]]:
    rng = random.Random(common)
    start = [rng.randrange(3, 200) for _ in range(common)]
    return [start + [rng.randrange(3, 200) for _ in range(rng.randint(1, 20))] for _ in range(count)]


def _write(model: Any, prompts: list[list[int]], batch: int) -> list[list[int]]:
    return [g.ids for g in generate(model, Tokens(), prompts, max_new_tokens=12, batch=batch, progress=silent)]


def _model(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(eos_token_id=2)
    read_trees(model)
    return model


@pytest.mark.parametrize("common", [0, 1, 30])
@pytest.mark.parametrize("shape", [*SHAPES, *OTHERS])
def test_prompts_that_begin_alike_are_continued_as_each_alone(shape: str, common: int) -> None:
    """Greedy answers of a batch are those of each prompt by itself, with windows that the beginning passes too."""
    model, prompts = _model((SHAPES | OTHERS)[shape]), _prompts(common, 5)
    assert _write(model, prompts, 5) == [_write(model, [prompt], 1)[0] for prompt in prompts]


def test_a_common_beginning_is_read_once() -> None:
    """Of a batch that begins with the same 30 tokens, those pass the model in one row; equal prompts keep a token of their own."""
    model = _model(SHAPES["Llama"])
    assert reads_trees(model)
    seen: list[torch.Size] = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    prompts = _prompts(30, 5)
    _write(model, prompts, 5)
    assert seen[:2] == [(1, 30), (5, max(map(len, prompts)) - 30)]
    seen.clear()
    _write(model, [prompts[0]] * 3, 3)
    assert seen[:2] == [(1, len(prompts[0]) - 1), (3, 1)]


def test_sampling_does_not_depend_on_the_batch(tiny: Tiny) -> None:
    """What is drawn for a prompt of the shipped model in NF4 is the same beside others and alone, and another with another seed."""
    texts = ["Tom has 3 apples and buys 4 more. How many has he?", "Ann had 9 pens. She lost 2 pens. How many are left?"]
    prompts = [tiny.tokenizer(f"Solve it. {text}", add_special_tokens=False)["input_ids"] for text in texts]
    settings: dict[str, Any] = {"max_new_tokens": 20, "progress": silent, "temperature": 2.0}
    with tiny.adapted() as model:
        together, apart, other = (
            [g.ids for g in generate(model, tiny.tokenizer, prompts, batch=batch, seed=seed, **settings)]
            for batch, seed in ((2, 5), (1, 5), (1, 6))
        )
    assert together == apart
    assert all(drawn != again for drawn, again in zip(apart, other, strict=True))


def test_keys_and_values_of_all_layers_lie_in_two_blocks() -> None:
    """Taken at once, so that they do not fill the holes that training has left in the heap; an unlike layer has a block of its own."""
    model = _model(SHAPES["Llama"])
    cache = reserve(model, 3, 40)
    model.get_decoder()(input_ids=torch.tensor([[5, 6, 7]] * 3), past_key_values=cache, use_cache=True)
    assert len(cache.layers) > 1
    for tensors in ([layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]):
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    room, new = Room(2, 3, 40), torch.zeros(3, 4, 1, 8)
    first, unlike, second = room.take(new), room.take(new[..., :6]), room.take(new)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr() != unlike.untyped_storage().data_ptr()
    assert unlike.shape == (3, 4, 40, 6)
