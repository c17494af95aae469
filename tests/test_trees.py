"""Rows that share their beginnings give the loss and gradients of each row alone, for the shapes of decoders in use."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)  # fmt: skip

from edge_agent.job import Lora
from edge_agent.training.head import weighted_loss
from edge_agent.training.packing import answer_hidden, lay_out, pack, reads_trees
from quantization.adapter import attach_adapter, checkpoint_activations
from quantization.load import read_trees

SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 200, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
SHAPES: dict[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**GROUPED),
    "Qwen2, a window in half of the layers": Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=16, max_window_layers=2),
    "Qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "Mistral, a window": MistralConfig(**GROUPED, sliding_window=16),
    "Gemma 2, capped scores and a window in half of the layers": Gemma2Config(**GROUPED, head_dim=16, sliding_window=16),
    "Phi": PhiConfig(**SIZES),
    "Phi 3, a window": Phi3Config(**GROUPED, sliding_window=16),
}
OTHERS: dict[str, PreTrainedConfig] = {
    "Mamba: no attention": MambaConfig(hidden_size=48, num_hidden_layers=2, vocab_size=200),
    "Falcon: its own attention": FalconConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=200),
}
Row = tuple[list[int], list[int]]


def _rows(shared: str, count: int) -> list[Row]:
    """Rows with nothing in common, with a common instruction, with questions that several rows have, or all the same."""
    rng = random.Random(f"{shared}/{count}")

    def some(length: int) -> list[int]:
        return [rng.randrange(3, 200) for _ in range(length)]

    instruction, question, answer = some(30), some(9), some(8)
    if shared == "nothing":
        return [(some(rng.randint(3, 30)), some(rng.randint(1, 12))) for _ in range(count)]
    if shared == "instruction":
        return [(instruction + some(rng.randint(1, 12)), some(rng.randint(1, 12))) for _ in range(count)]
    if shared == "question":
        return [(instruction + (question if i % 2 else some(7)), answer[: i % 5] + some(rng.randint(1, 9))) for i in range(count)]
    return [(instruction + question, answer) for _ in range(count)]


def _model(config: PreTrainedConfig, checkpointing: bool) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.requires_grad_(False)
    read_trees(model)
    model = attach_adapter(model, Lora(dropout=0.0), 1, "random")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    if checkpointing:
        checkpoint_activations(model)
    return model.train()


def _alone(model: Any, rows: list[Row]) -> torch.Tensor:
    """The loss that the formulas give, row by row through the whole model."""
    total = torch.zeros(())
    for prompt, answer in rows:
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        total = total - logp.sum() - 0.5 * torch.log1p(-logp.exp()).sum()
    return total


def _together(model: Any, rows: list[Row], micro_batch: int) -> torch.Tensor:
    total = torch.zeros(())
    for start in range(0, len(rows), micro_batch):
        packed = pack(model, rows[start : start + micro_batch], 0)
        ones = torch.ones(len(packed.target_ids_N))
        total = total + weighted_loss(model, answer_hidden(model, packed), packed.target_ids_N, ones, ones / 2, 7).total
    return total


def _gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("shared", ["nothing", "instruction", "question", "everything"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tree_gives_the_gradients_of_its_rows(shape: str, checkpointing: bool, shared: str) -> None:
    """Loss and gradients of all adapters to 1e-5, in micro-batches of 1 to 8."""
    model, rows = _model(SHAPES[shape], checkpointing), _rows(shared, 8)
    assert reads_trees(model)
    wanted = _alone(model, rows)
    gradients = _gradients(model, wanted)
    for micro_batch in (1, 3, 8):
        loss = _together(model, rows, micro_batch)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
        assert (_gradients(model, loss) - gradients).norm() <= 1e-5 * gradients.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_last_layer_skips_what_nobody_asks_for(shape: str) -> None:
    """Its MLP reads the positions that predict answers, in the backward pass too, and all of them again where no tree is read."""
    model, rows = _model(SHAPES[shape], checkpointing=True), _rows("question", 3)
    packed = pack(model, rows, 0)
    tokens, asked = packed.inputs["input_ids"].shape[1], len(set(packed.where_N.tolist()))
    read: list[list[int]] = [[], []]
    for layer, seen in zip(model.get_decoder().layers[-2:], read, strict=True):
        into = next(part for name, part in layer.mlp.named_modules() if name in ("gate_proj", "gate_up_proj", "fc1"))
        into.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].shape[1]))
    answer_hidden(model, packed).sum().backward()
    model(input_ids=packed.inputs["input_ids"], use_cache=False)
    assert asked < tokens
    assert read == [[tokens] * 3, [asked, asked, tokens]]


@pytest.mark.parametrize(("shape", "masks"), [("Llama", 1), ("Gemma 2, capped scores and a window in half of the layers", 0)])
def test_layers_share_the_mask_of_a_branch(shape: str, masks: int) -> None:
    """For the backward pass of all layers one is kept, in the type of the scores; where the scores are capped none needs to be."""
    model, rows = _model(SHAPES[shape], checkpointing=False), _rows("instruction", 2)
    packed = pack(model, rows, 0)
    first, second = packed.inputs["tree"].branches
    assert first.shared == 0 < second.shared
    size, kept = torch.Size([second.stop - second.start, second.length]), set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == size and tensor.numel() == size.numel():
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answer_hidden(model, packed)
    assert len(kept) == masks


@pytest.mark.parametrize("shape", OTHERS)
def test_other_architectures_get_padded_rows(shape: str, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot read a tree keeps its own attention, which the log says, and padded rows give the loss of each row alone."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(OTHERS[shape], dtype=torch.float32).eval()
    read_trees(model)
    assert not reads_trees(model)
    assert "trees_not_read" in caplog.text
    rows = _rows("question", 8)
    with torch.no_grad():
        torch.testing.assert_close(_together(model, rows, 4), _alone(model, rows), rtol=1e-5, atol=0)


def test_lack_of_memory_is_no_reason_to_give_trees_up(caplog: pytest.LogCaptureFixture) -> None:
    """It is raised where the trial of a tree meets it; another error leaves the model its own attention, and a line in the log."""
    model: Any = AutoModelForCausalLM.from_config(SHAPES["Llama"], dtype=torch.float32, attn_implementation="sdpa").eval()
    raised: list[Exception] = [RuntimeError("no kernel for this"), MemoryError()]

    def fail(_: Any, __: Any, given: dict[str, Any]) -> None:
        if "tree" in given:
            raise raised.pop(0)

    model.get_decoder().register_forward_pre_hook(fail, with_kwargs=True)
    read_trees(model)
    assert not reads_trees(model)
    assert "no kernel for this" in caplog.text
    with pytest.raises(MemoryError):
        read_trees(model)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=8))
def test_a_tree_spells_every_row_and_holds_each_beginning_once(rows: list[list[int]]) -> None:
    """Every place has the position that it has in its row; no two places are the same beginning of rows."""
    layout = lay_out(rows)
    for row, places in zip(rows, layout.places, strict=True):
        assert [layout.ids[at] for at in places] == row
        assert [layout.positions[at] for at in places] == list(range(len(row)))
    beginnings = {tuple(row[: n + 1]) for row in rows for n in range(len(row))}
    assert len(layout.ids) == len(beginnings)
