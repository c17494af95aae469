"""Packed and chunked losses equal what the plain formulas give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from edge_agent.training.head import answer_logp, weighted_loss
from edge_agent.training.packing import answer_hidden, pack
from profiles.device import device_profile
from quantization.load import load_model
from quantization.model_files import find_model

ROWS = [([5, 6, 7, 8, 9], [10, 11, 12]), ([20, 21], [22, 23, 24, 25, 26, 0]), ([30], [31])]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return load_model(find_model(str(tiny_model)), device_profile("cpu"))


def _plain_logp(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


@torch.no_grad()
def test_packed_scores_equal_single_rows(model: Any) -> None:
    """Padding and chunks change no log-probability."""
    packed = pack(model, ROWS, 1)
    logp = answer_logp(model, answer_hidden(model, packed), packed.target_ids_N, 2)
    torch.testing.assert_close(logp, torch.cat([_plain_logp(model, p, a) for p, a in ROWS]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "says", [{}, {"final_logit_softcapping": 3.0}, {"logit_scale": 0.5}, {"logits_scaling": 4.0, "final_logit_softcapping": 2.0}]
)
def test_weighted_loss_and_gradient_equal_the_formula(says: dict[str, float], model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of likelihood * -log b + unlikelihood * -log(1 - b), and its gradient, in chunks of any size, for logits of any finish."""
    for name, value in says.items():
        monkeypatch.setattr(model.config, name, value, raising=False)
    packed = pack(model, ROWS, 1)
    hidden = answer_hidden(model, packed).detach()
    likelihood = torch.tensor([1.0, 0.5, 0, 2, 1, 1, 0, 0.3, 1, 1])
    unlikelihood = torch.tensor([0.0, 0.5, 2, 0, 0, 0, 1, 0, 0, 0.1])
    plain = hidden.clone().requires_grad_()
    logits = model.get_output_embeddings()(plain).float() * says.get("logit_scale", 1) / says.get("logits_scaling", 1)
    if bound := says.get("final_logit_softcapping"):
        logits = bound * torch.tanh(logits / bound)
    b = logits.softmax(-1).gather(1, packed.target_ids_N[:, None])[:, 0]
    wanted = (likelihood * -b.log() + unlikelihood * -torch.log(1 - b)).sum()
    wanted.backward()
    for chunk in (1, 3, 64):
        chunked = hidden.clone().requires_grad_()
        loss = weighted_loss(model, chunked, packed.target_ids_N, likelihood, unlikelihood, chunk)
        loss.total.backward()
        torch.testing.assert_close(loss.total, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loss.logp_N, b.log().detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(chunked.grad, plain.grad, rtol=1e-4, atol=1e-6)


class _Head:
    """The smallest model that `weighted_loss` needs: an output head that gives its input back."""

    config = LlamaConfig()

    def get_output_embeddings(self) -> torch.nn.Module:
        return torch.nn.Identity()


def test_unlikelihood_of_a_certain_token_is_finite_and_pushes_it_down() -> None:
    """Where b is 1 in floating point, log(1 - b) is still finite and its gradient lowers the logit."""
    logits = torch.tensor([[200.0, 0.0, -5.0]], requires_grad=True)
    loss = weighted_loss(_Head(), logits, torch.tensor([0]), torch.zeros(1), torch.ones(1), 8).total
    loss.backward()
    assert loss.item() == pytest.approx(200, rel=1e-3)
    assert logits.grad[0, 0] == pytest.approx(1.0)
