"""Rows of prompt and answer as tensors, and the few positions of them that the output head must see.

Shapes: B rows, T tokens of the longest row, N answer tokens of all rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint


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


class AnswerScores(NamedTuple):
    """Log-probabilities of the answer tokens, and of the likeliest token in the place of each, in 32 bits; of all rows, or of one."""

    logp_N: torch.Tensor
    best_logp_N: torch.Tensor
    best_ids_N: torch.Tensor


@torch.no_grad()
def answer_scores(model: Any, hidden_ND: torch.Tensor, target_ids_N: torch.Tensor, chunk: int) -> AnswerScores:
    """Return the scores of every answer token; at most `chunk` x V logits exist at once."""
    head = model.get_output_embeddings()
    parts = []
    for hidden, ids in zip(hidden_ND.split(chunk), target_ids_N.split(chunk), strict=True):
        logits = head(hidden).float()
        lse, best = logits.logsumexp(1), logits.max(1)
        parts.append((logits.gather(1, ids[:, None])[:, 0] - lse, best.values - lse, best.indices))
    return AnswerScores(*map(torch.cat, zip(*parts, strict=True)))


def answer_logp(model: Any, hidden_ND: torch.Tensor, target_ids_N: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the log-probability of every answer token in 32 bits; at most `chunk` x V logits exist at once, with a gradient too."""
    head = model.get_output_embeddings()
    chunks = zip(hidden_ND.split(chunk), target_ids_N.split(chunk), strict=True)
    return torch.cat([checkpoint(_chunk_logp, head, hidden, ids, use_reentrant=False) for hidden, ids in chunks])


def _chunk_logp(head: torch.nn.Module, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = head(hidden).float()
    return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)


def weighted_loss(
    model: Any, hidden_ND: torch.Tensor, target_ids_N: torch.Tensor, likelihood_N: torch.Tensor, unlikelihood_N: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Return the sum over tokens of likelihood * -log b + unlikelihood * -log(1 - b).

    Each chunk's logits are computed again in the backward pass, so at most `chunk` x V of them exist at once.
    """
    head = model.get_output_embeddings()
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    parts = (hidden_ND, target_ids_N, likelihood_N, unlikelihood_N)
    for hidden, ids, likelihood, unlikelihood in zip(*(p.split(chunk) for p in parts), strict=True):
        total = total + checkpoint(_chunk_loss, head, hidden, ids, likelihood, unlikelihood, use_reentrant=False)
    return total


def _chunk_loss(
    head: torch.nn.Module, hidden: torch.Tensor, ids: torch.Tensor, likelihood: torch.Tensor, unlikelihood: torch.Tensor
) -> torch.Tensor:
    logits: torch.Tensor = head(hidden).float()
    all_lse = logits.logsumexp(1)
    loss: torch.Tensor = (likelihood * (all_lse - logits.gather(1, ids[:, None])[:, 0])).sum()
    rows = unlikelihood.nonzero().flatten()
    if len(rows) == 0:
        return loss
    # 1 - b is the sum over all other tokens, exact and with a gradient even where b is 1 in floating point.
    others = logits[rows].scatter(1, ids[rows, None], float("-inf")).logsumexp(1)
    return loss + (unlikelihood[rows] * (all_lse[rows] - others)).sum()
