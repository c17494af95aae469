"""The frozen output head on answer positions: log-probabilities and weighted losses, a chunk of rows at a time.

No tensor of all answer tokens times the vocabulary ever exists, with or without gradient.

Shapes: N answer tokens of all rows, C of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from quantization.logits import Finish

ROWS = 32
"""Rows of logits that are widened to 32 bits at once."""


class AnswerScores(NamedTuple):
    """Log-probabilities of the answer tokens, and of the likeliest token in the place of each, in 32 bits; of all rows, or of one."""

    logp_N: torch.Tensor
    best_logp_N: torch.Tensor
    best_ids_N: torch.Tensor


@torch.no_grad()
def answer_scores(model: Any, hidden_ND: torch.Tensor, target_ids_N: torch.Tensor, chunk: int) -> AnswerScores:
    """Return the scores of every answer token; at most `chunk` x V logits exist at once."""
    head, finish = _head(model)
    parts = []
    for hidden_CD, ids_C in zip(hidden_ND.split(chunk), target_ids_N.split(chunk), strict=True):
        logits_CV = finish(head(hidden_CD).float())
        lse_C, best = logits_CV.logsumexp(1), logits_CV.max(1)
        parts.append((logits_CV.gather(1, ids_C[:, None])[:, 0] - lse_C, best.values - lse_C, best.indices))
    return AnswerScores(*map(torch.cat, zip(*parts, strict=True)))


def answer_logp(model: Any, hidden_ND: torch.Tensor, target_ids_N: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the log-probability of every answer token in 32 bits; at most `chunk` x V logits exist at once, with a gradient too."""
    head, finish = _head(model)
    chunks = zip(hidden_ND.split(chunk), target_ids_N.split(chunk), strict=True)
    return torch.cat([checkpoint(_chunk_logp, head, finish, hidden_CD, ids_C, use_reentrant=False) for hidden_CD, ids_C in chunks])


def _head(model: Any) -> tuple[torch.nn.Module, Finish]:
    return model.get_output_embeddings(), Finish.of(model.config.get_text_config())


def _chunk_logp(head: torch.nn.Module, finish: Finish, hidden_CD: torch.Tensor, ids_C: torch.Tensor) -> torch.Tensor:
    logits_CV: torch.Tensor = finish(head(hidden_CD).float())
    return logits_CV.gather(1, ids_C[:, None])[:, 0] - logits_CV.logsumexp(1)


class WeightedLoss(NamedTuple):
    """The sum over tokens of likelihood * -log b + unlikelihood * -log(1 - b), and log b of every token without gradient; in 32 bits."""

    total: torch.Tensor
    logp_N: torch.Tensor


def weighted_loss(
    model: Any, hidden_ND: torch.Tensor, target_ids_N: torch.Tensor, likelihood_N: torch.Tensor, unlikelihood_N: torch.Tensor, chunk: int
) -> WeightedLoss:
    """Return the loss of answer tokens with the weights of each.

    The gradient of the hidden states is formed with the loss: nothing is computed again in the backward pass, and beside the logits of
    a chunk, which its gradient takes the place of, a few rows of them exist in 32 bits. The head gets no gradient.
    """
    parts = hidden_ND, target_ids_N, likelihood_N, unlikelihood_N
    return WeightedLoss(*_FrozenHeadLoss.apply(*parts, *_head(model), chunk))  # type: ignore[no-untyped-call]


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        target_ids_N: torch.Tensor,
        likelihood_N: torch.Tensor,
        unlikelihood_N: torch.Tensor,
        head: torch.nn.Module,
        finish: Finish,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, logp_N = hidden_ND.new_zeros((), dtype=torch.float32), hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32)
        unlikely_N = unlikelihood_N.cpu()  # asked on the host row by row, so that the device is waited for once
        needed = ctx.needs_input_grad[0]
        grad_ND = torch.empty_like(hidden_ND) if needed else None
        parts = (hidden_ND, target_ids_N, likelihood_N, unlikelihood_N, unlikely_N, logp_N)
        for start in range(0, len(hidden_ND), chunk):
            hidden_CD, *of_chunk = (part[start : start + chunk] for part in parts)
            with torch.set_grad_enabled(needed):
                hidden_CD = hidden_CD.detach().requires_grad_(needed)
                logits_CV = head(hidden_CD)
            grad_CV = logits_CV.detach()
            total += _loss_and_gradient(finish, grad_CV, *of_chunk)
            if grad_ND is not None:
                (grad_ND[start : start + chunk],) = torch.autograd.grad(logits_CV, hidden_CD, grad_CV)
        ctx.save_for_backward(grad_ND)
        ctx.mark_non_differentiable(logp_N)
        return total, logp_N

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _of_logp: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad.to(grad_ND.dtype), None, None, None, None, None, None


def _loss_and_gradient(
    finish: Finish,
    logits_CV: torch.Tensor,
    ids_C: torch.Tensor,
    likelihood_C: torch.Tensor,
    unlikelihood_C: torch.Tensor,
    unlikely_C: torch.Tensor,
    logp_C: torch.Tensor,
) -> torch.Tensor:
    """Return the loss of a chunk, and put its gradient for the logits in their place, in their type; a few rows at a time in 32 bits.

    With l and u the weights and p the softmax, the gradient of the finished logits is (l + u) p - l at the target and (l + u) p - u q
    elsewhere, where q is the softmax over all tokens but the target. `unlikely_C` are the weights u on the host; `logp_C` takes log b.
    """
    total = torch.zeros((), device=logits_CV.device)
    for start in range(0, len(logits_CV), ROWS):
        rows = slice(start, start + ROWS)
        logits_RV, ids_R1, likelihood_R1, unlikelihood_R1 = logits_CV[rows], *(x[rows, None] for x in (ids_C, likelihood_C, unlikelihood_C))
        finished_RV = finish(logits_RV)
        logp_RV = finished_RV.log_softmax(1, dtype=torch.float32)
        logp_R1 = logp_RV.gather(1, ids_R1)
        logp_C[rows] = logp_R1[:, 0]
        total -= (likelihood_R1 * logp_R1).sum()
        grad_RV = logp_RV.exp().mul_(likelihood_R1 + unlikelihood_R1).scatter_add_(1, ids_R1, -likelihood_R1)
        if unlikely_C[rows].any():
            # 1 - b is the sum over all other tokens, exact and with a gradient even where b is 1 in floating point.
            others_RV = logp_RV.scatter_(1, ids_R1, float("-inf"))
            rest_R1 = others_RV.logsumexp(1, keepdim=True)
            total -= (unlikelihood_R1 * rest_R1).sum()
            grad_RV -= others_RV.sub_(rest_R1).exp_().mul_(unlikelihood_R1)
        logits_RV.copy_(finish.to_head(grad_RV, finished_RV))
    return total
