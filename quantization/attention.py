"""Attention over a tree of rows: every token sees the tokens before it on its own row, and nothing is computed twice.

Each branch of the tree is one call of PyTorch's attention, from the branch's own tokens to all tokens of its row. So there is no mask of
T x T, and no work for pairs of tokens that do not see each other.

Shapes: T tokens of the pack, H query heads, K key heads, C new tokens of a branch, L tokens of its row, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

TREE = "edge_agent_tree"
"""The name of this attention among those of transformers."""


@dataclass(frozen=True)
class Branch:
    """Tokens `start` to `stop` of a pack, which follow the first `shared` tokens of `path_L`, the places of a whole row in T."""

    start: int
    stop: int
    shared: int
    path_L: torch.Tensor | slice

    @property
    def length(self) -> int:
        return self.shared + self.stop - self.start


@dataclass(frozen=True)
class Tree:
    """The branches of a pack in the order of their tokens."""

    branches: Sequence[Branch]
    windows: set[int | None] = field(default_factory=set)
    """The windows of the layers that have read it."""
    _masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    def mask_CL(self, number: int, window: int | None, device: torch.device) -> torch.Tensor:
        """Return which tokens of its row a branch's tokens see, at most the last `window`; the layers share it."""
        key = number, window
        if key not in self._masks:
            branch = self.branches[number]
            row_C, row_L = torch.arange(branch.shared, branch.length)[:, None], torch.arange(branch.length)
            sees_CL = row_L <= row_C
            if window is not None:
                sees_CL &= row_C - row_L < window
            self._masks[key] = sees_CL.to(device)
        return self._masks[key]


def tree_inputs(input_ids_T: torch.Tensor, position_ids_T: torch.Tensor, tree: Tree) -> dict[str, Any]:
    """Return what a decoder takes to read a tree."""
    # A mask of four dimensions keeps transformers from making one of its own; nothing reads it.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids_T.device)
    return {"input_ids": input_ids_T[None], "position_ids": position_ids_T[None], "attention_mask": mask, "tree": tree}


def tree_attention(
    module: torch.nn.Module, query_1HTE: torch.Tensor, key_1KTE: torch.Tensor, value_1KTE: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, tree: Tree | None = None, sliding_window: int | None = None,
    softcap: float | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Return the attention of all heads, 1 x T x H x E; without a tree, that of ordinary rows.

    The parameters that transformers calls an attention with. `softcap` bounds the scores by a hyperbolic tangent (Gemma 2).
    """
    if tree is None:
        if softcap is None:
            return sdpa_attention_forward(module, query_1HTE, key_1KTE, value_1KTE, attention_mask, dropout, scaling, **more)
        return _capped(query_1HTE, key_1KTE, value_1KTE, attention_mask, dropout, scaling, softcap).transpose(1, 2).contiguous(), None
    tree.windows.add(sliding_window)
    found = []
    for number, branch in enumerate(tree.branches):
        query, key, value = query_1HTE[:, :, branch.start : branch.stop], key_1KTE[:, :, branch.path_L], value_1KTE[:, :, branch.path_L]
        window = sliding_window if sliding_window is not None and sliding_window < branch.length else None
        if softcap is not None:
            found.append(_capped(query, key, value, tree.mask_CL(number, window, query.device), dropout, scaling, softcap))
        else:
            causal = branch.shared == 0 and window is None
            found.append(
                scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    None if causal else tree.mask_CL(number, window, query.device),
                    dropout,
                    causal,
                    scale=scaling,
                    enable_gqa=query.shape[1] != key.shape[1],
                )  # fmt: skip
            )
    return torch.cat(found, 2).transpose(1, 2).contiguous(), None


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    cap: float,
) -> torch.Tensor:
    """Attention whose scores are bounded; `mask` says what is seen, and None is the causal one."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    scores = (scores / cap).tanh() * cap
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril(scores.shape[3] - scores.shape[2])
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    shares = torch.nn.functional.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return shares @ value


AttentionInterface.register(TREE, tree_attention)
# For ordinary rows the masks of PyTorch's attention.
AttentionMaskInterface.register(TREE, sdpa_mask)
