"""Rows of prompt and answer in one forward pass, and the few positions of them that the output head must see.

What rows have in common at their beginning (an instruction, or a question with several outputs) is computed once: a pack is a tree of
tokens. Architectures whose layers are not all attention get padded rows instead.

Shapes: B rows, T tokens of the pack, N answer tokens of all rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import save_on_cpu

from quantization.attention import TREE, Branch, Tree, tree_inputs


@dataclass(frozen=True)
class Pack:
    """Rows as a decoder takes them. `where_N` are the flat positions of `input_ids` that predict the answer tokens, row by row."""

    inputs: dict[str, Any]
    where_N: torch.Tensor
    target_ids_N: torch.Tensor
    lengths: tuple[int, ...]
    """Answer tokens of each row."""
    tokens: int
    """What is computed, padding left out."""


def pack(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> Pack:
    """Return (prompt, answer) rows as one pack for a model. The last token of a row predicts nothing and is left out."""
    whole = [[*prompt, *answer][:-1] for prompt, answer in rows]
    starts = [len(prompt) - 1 for prompt, _ in rows]
    inputs, places = _tree(whole, starts, model.device) if reads_trees(model) else _padded(whole, pad_id, model.device)
    return Pack(
        inputs,
        torch.tensor([at for row, start in zip(places, starts, strict=True) for at in row[start:]], device=model.device),
        torch.tensor([token for _, answer in rows for token in answer], device=model.device),
        tuple(len(answer) for _, answer in rows),
        len({at for row in places for at in row}),
    )


def reads_trees(model: Any) -> bool:
    return bool(model.config.get_text_config()._attn_implementation == TREE)


def longest_first(rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[int]:
    """Return the order of (prompt, answer) rows to pack them in: what is too long shows at once, and equal prompts are neighbours."""
    longest: dict[tuple[int, ...], int] = {}
    for prompt, answer in rows:
        longest[prompt] = max(longest.get(prompt, 0), len(prompt) + len(answer))
    return sorted(range(len(rows)), key=lambda n: (-longest[rows[n][0]], rows[n][0], -len(rows[n][1])))


class Layout(NamedTuple):
    """Rows as a tree: its tokens and their positions, of each row the places of its tokens, and the branches as (start, row)."""

    ids: list[int]
    positions: list[int]
    places: list[list[int]]
    branches: list[tuple[int, int]]


def lay_out(rows: Sequence[Sequence[int]]) -> Layout:
    """Lay rows out as a tree; the tokens of a branch are those of a row that no row before it has at its beginning."""
    tree = Layout([], [], [[] for _ in rows], [])
    before: Sequence[int] = ()
    path: list[int] = []
    for number in sorted(range(len(rows)), key=lambda n: tuple(rows[n])):  # neighbours have most in common
        row, start = rows[number], len(tree.ids)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, row, strict=False)))
        tree.ids.extend(row[shared:])
        tree.positions.extend(range(shared, len(row)))
        path = [*path[:shared], *range(start, len(tree.ids))]
        if shared < len(row):
            tree.branches.append((start, number))
        tree.places[number].extend(path)
        before = row
    return tree


def _tree(
    rows: Sequence[Sequence[int]], starts: Sequence[int], device: torch.device
) -> tuple[dict[str, Any], list[list[int]]]:  # fmt: skip
    """Return the decoder's inputs, 1 x T, and of each row the places of its tokens; the rows are asked for from `starts` on."""
    layout = lay_out(rows)
    branches = []
    for start, number in layout.branches:
        path = layout.places[number]
        new = path[-1] + 1 - start
        whole = slice(0, len(path)) if path[-1] == len(path) - 1 else torch.tensor(path, device=device)
        branches.append(Branch(start, start + new, len(path) - new, whole))
    ids_T, positions_T = (torch.tensor(numbers, device=device) for numbers in (layout.ids, layout.positions))
    asked = sorted({at for row, start in zip(layout.places, starts, strict=True) for at in row[start:]})
    asked_A = torch.tensor(asked, device=device) if len(asked) < len(layout.ids) else None
    return tree_inputs(ids_T, positions_T, Tree(branches, asked_A)), layout.places


def _padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[dict[str, Any], list[list[int]]]:
    """Return the decoder's inputs, B x T padded on the right, and of each row the places of its tokens in B x T."""
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], device=device),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device),
    }
    return inputs, [list(range(number * width, number * width + len(row))) for number, row in enumerate(rows)]


def answer_hidden(model: Any, packed: Pack, offload: bool = False) -> torch.Tensor:
    """Return the hidden states after the final norm that predict the answer tokens, N x D.

    With `offload` what is kept for the backward pass waits in host memory.
    """
    with save_on_cpu(pin_memory=torch.cuda.is_available()) if offload else nullcontext():
        hidden_BTD: torch.Tensor = model.get_decoder()(**packed.inputs, use_cache=False).last_hidden_state
    return hidden_BTD.flatten(0, 1)[packed.where_N]
