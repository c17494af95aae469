"""Attention over a tree of rows: every token sees the tokens before it on its own row, and nothing is computed twice.

Each branch of the tree is one call of PyTorch's attention, from the branch's own tokens to all tokens of its row. So there is no mask of
T x T, and no work for tokens of different rows. A branch that follows others has a mask of C x L, one for all layers; on CUDA it has none
unless there is a window or a bound of the scores.

Shapes: T tokens of the pack, A of them asked for, H query heads, K key heads, C new tokens of a branch, L tokens of its row, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
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


class Tree:
    """The branches of a pack in the order of their tokens, and the masks that its layers share.

    `asked_A` are the positions whose hidden states somebody wants, ascending; at others they may be anything. None stands for all.
    """

    def __init__(self, branches: Sequence[Branch], asked_A: torch.Tensor | None = None) -> None:
        self.branches = branches
        self.asked_A = asked_A
        self.windows: set[int | None] = set()
        """The windows of the layers that have read it."""
        self._masks: dict[tuple[int, int | None, bool], torch.Tensor] = {}

    def mask(self, branch: Branch, window: int | None, query: torch.Tensor, added: bool) -> torch.Tensor:
        """Return what is added to the scores of a branch, C x L: 0 for what its tokens see, at most `window` tokens, else minus infinity.

        It has the type of the queries: of any other PyTorch's attention would make one of its own in every layer, and keep it for the
        backward pass. On CUDA, without a window, it has no numbers and names the kernels that read none, unless the caller adds it itself.
        """
        key = branch.start, window, added
        if key not in self._masks:
            lazy = query.is_cuda and window is None and not added
            new = branch.stop - branch.start
            self._masks[key] = causal_lower_right(new, branch.length) if lazy else _unseen(branch, window).to(query)
        return self._masks[key]


def _unseen(branch: Branch, window: int | None) -> torch.Tensor:
    """Return minus infinity for what the tokens of a branch do not see of their row, else 0, C x L."""
    from_C, to_L = torch.arange(branch.shared, branch.length)[:, None], torch.arange(branch.length)
    unseen_CL = to_L > from_C
    if window is not None:
        unseen_CL |= from_C - to_L >= window
    return torch.zeros(unseen_CL.shape).masked_fill_(unseen_CL, -math.inf)


def shortest_window(config: Any) -> int | None:
    """Return how many tokens the layers with a sliding window see; None for a model without such layers."""
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if kinds is None or "sliding_attention" in kinds else None


def tree_inputs(input_ids_T: torch.Tensor, position_ids_T: torch.Tensor, tree: Tree) -> dict[str, Any]:
    """Return what a decoder takes to read a tree."""
    # A mask of four dimensions keeps transformers from making one of its own; nothing reads it.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids_T.device)
    return {"input_ids": input_ids_T[None], "position_ids": position_ids_T[None], "attention_mask": mask, "tree": tree}


def tree_attention(
    module: torch.nn.Module,
    query_1HTE: torch.Tensor,
    key_1KTE: torch.Tensor,
    value_1KTE: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tree: Tree | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention of all heads, 1 x T x H x E; without a tree, that of ordinary rows.

    The parameters are those that transformers calls an attention with. `softcap` bounds the scores by a hyperbolic tangent (Gemma 2).
    """
    if tree is None and softcap is None:
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query_1HTE, key_1KTE, value_1KTE, attention_mask, dropout, scaling, **more
        )
        return whole
    if tree is None:
        found = _attend(query_1HTE, key_1KTE, value_1KTE, attention_mask, dropout, scaling, softcap)
    else:
        tree.windows.add(sliding_window)
        queries = query_1HTE.split([branch.stop - branch.start for branch in tree.branches], 2)
        keys, values = (_rows_of(states, tree.branches) for states in (key_1KTE, value_1KTE))
        parts = []
        for branch, query, key, value in zip(tree.branches, queries, keys, values, strict=True):
            window = sliding_window if sliding_window is not None and sliding_window < branch.length else None
            plain = branch.shared == 0 and window is None and softcap is None
            mask = None if plain else tree.mask(branch, window, query, added=softcap is not None)
            parts.append(_attend(query, key, value, mask, dropout, scaling, softcap))
        found = torch.cat(parts, 2)
    return found.transpose(1, 2).contiguous(), None


def _rows_of(states_1KTE: torch.Tensor, branches: Sequence[Branch]) -> Iterable[torch.Tensor]:
    """Return the keys or values of every branch's row, 1 x K x L x E each; without a gradient one exists at a time."""
    if torch.is_grad_enabled() and states_1KTE.requires_grad:
        return _Paths.apply(states_1KTE, branches)  # type: ignore[no-any-return, no-untyped-call]
    return (states_1KTE[:, :, branch.path_L] for branch in branches)


class _Paths(torch.autograd.Function):
    """The rows of all branches, whose gradients are added up in one tensor."""

    @staticmethod
    def forward(ctx: Any, states_1KTE: torch.Tensor, branches: Sequence[Branch]) -> tuple[torch.Tensor, ...]:
        ctx.branches, ctx.shape = branches, states_1KTE.shape
        return tuple(states_1KTE[:, :, branch.path_L] for branch in branches)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        total_1KTE = grads[0].new_zeros(ctx.shape)
        for branch, grad_1KLE in zip(ctx.branches, grads, strict=True):
            if isinstance(branch.path_L, slice):
                total_1KTE[:, :, branch.path_L] += grad_1KLE
            else:
                total_1KTE.index_add_(2, branch.path_L, grad_1KLE)
        return total_1KTE, None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Return the attention of some tokens; `mask` is true for what they see, or added to the scores, and None is the causal one."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1 and query.is_cuda and type(mask) is torch.Tensor:
        # With a mask no kernel but the plainest takes fewer heads of keys, and that one keeps all scores.
        key, value, repeats = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), 1
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, mask, dropout, mask is None, scale=scaling, enable_gqa=repeats > 1)
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril(scores.shape[3] - scores.shape[2])
    scores = (scores / softcap).tanh() * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    return torch.nn.functional.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout) @ value


AttentionInterface.register(TREE, tree_attention)
# For ordinary rows the masks of PyTorch's attention.
AttentionMaskInterface.register(TREE, sdpa_mask)
