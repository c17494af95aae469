"""Rows of prompt and answer as tensors, and the few positions of them that the output head must see.

Shapes: B rows, T tokens of the longest row, N answer tokens of all rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Pack:
    """Rows of a micro-batch, padded on the right. `where_N` are the flat positions in B x T that predict the answer tokens."""

    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    where_N: torch.Tensor
    target_ids_N: torch.Tensor
    lengths: tuple[int, ...]
    """Answer tokens of each row."""

    @property
    def tokens(self) -> int:
        return int(self.attention_mask_BT.sum().item())


def pack(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, device: torch.device) -> Pack:
    """Return (prompt, answer) rows as one pack."""
    width = max(len(p) + len(a) for p, a in rows)
    ids = [[*p, *a] + [pad_id] * (width - len(p) - len(a)) for p, a in rows]
    mask = [[1] * (len(p) + len(a)) + [0] * (width - len(p) - len(a)) for p, a in rows]
    where = [b * width + len(p) - 1 + t for b, (p, a) in enumerate(rows) for t in range(len(a))]
    return Pack(
        torch.tensor(ids, device=device),
        torch.tensor(mask, device=device),
        torch.tensor(where, device=device),
        torch.tensor([t for _, a in rows for t in a], device=device),
        tuple(len(a) for _, a in rows),
    )


def answer_hidden(model: Any, packed: Pack) -> torch.Tensor:
    """Return the hidden states after the final norm that predict the answer tokens, N x D."""
    output = model.get_decoder()(input_ids=packed.input_ids_BT, attention_mask=packed.attention_mask_BT, use_cache=False)
    hidden_BTD: torch.Tensor = output.last_hidden_state
    return hidden_BTD.flatten(0, 1)[packed.where_N]
