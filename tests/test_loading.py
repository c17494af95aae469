"""Loading in 4 bits, and the trap of evaluating before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from edge_agent.errors import ModelMissing, ModelUnsafe, ModelUnsupported
from edge_agent.job import Lora
from edge_agent.training.head import weighted_loss
from edge_agent.training.packing import answer_hidden, pack
from profiles.device import device_profile
from quantization.adapter import attach_adapter
from quantization.load import load_model
from quantization.model_files import find_model

ROWS = [(list(range(5, 45)), list(range(50, 70)))]


def _gradients(tiny_model: Path, *, evaluate_first: bool, guard: bool) -> dict[str, torch.Tensor]:
    """LoRA gradients of one loss, after a forward pass in `.eval()` without gradient or on a fresh model."""
    model: Any = load_model(find_model(str(tiny_model)), device_profile("cpu"))
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and not guard:
            module.support_avx512bf16_for_cpu = _has_avx512bf16()
    model = attach_adapter(model, Lora(), 3, "tiny")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    packed = pack(model, ROWS, 1)
    if evaluate_first:
        with torch.no_grad():
            model.eval()
            answer_hidden(model, packed)
    ones = torch.ones(len(ROWS[0][1]))
    model.train()
    weighted_loss(model, answer_hidden(model, packed), packed.target_ids_N, ones, torch.zeros_like(ones), 64).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _has_avx512bf16() -> bool:
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")


def test_model_is_nf4_with_double_quantisation(tiny_model: Path) -> None:
    """Every linear layer but the head is NF4 with nested scales; nothing is trainable."""
    model = load_model(find_model(str(tiny_model)), device_profile("cpu"))
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 4 * 7
    assert all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in layers)
    assert not any(p.requires_grad for p in model.parameters())


def test_evaluating_first_changes_no_gradient(tiny_model: Path) -> None:
    """Evaluate, then train gives the gradients of training alone, bit for bit."""
    alone = _gradients(tiny_model, evaluate_first=False, guard=True)
    after = _gradients(tiny_model, evaluate_first=True, guard=True)
    assert len(alone) == 4 * 7 * 2
    assert alone.keys() == after.keys()
    assert all(torch.equal(alone[name], after[name]) for name in alone)


@pytest.mark.skipif(not _has_avx512bf16(), reason="THE TRAP NEEDS A CPU WITH AVX512-BF16: this check of the guard did not run")
@pytest.mark.filterwarnings("ignore")
def test_without_the_guard_gradients_would_be_wrong(tiny_model: Path) -> None:
    """The guard is needed: with it off, the same comparison fails on this CPU."""
    alone = _gradients(tiny_model, evaluate_first=False, guard=True)
    after = _gradients(tiny_model, evaluate_first=True, guard=False)
    assert any(name not in after or not torch.allclose(alone[name], after[name], rtol=0.05) for name in alone)


def _model_directory(path: Path, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


def test_unknown_model_is_missing(tmp_path: Path) -> None:
    """A name that is no directory and not cached, and a directory without weights."""
    with pytest.raises(ModelMissing, match="Hugging Face cache"):
        find_model("nobody/no-such-model")
    with pytest.raises(ModelMissing, match="no such directory"):
        find_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelMissing, match=r"no \*\.safetensors"):
        find_model(str(_model_directory(tmp_path / "empty")))


def test_models_that_would_run_code_are_refused(tmp_path: Path) -> None:
    """Pickled weights only, or Python files of their own."""
    pickled = _model_directory(tmp_path / "pickled")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelUnsafe, match="pickled weights only"):
        find_model(str(pickled))
    with pytest.raises(ModelUnsafe, match="auto_map"):
        find_model(str(_model_directory(tmp_path / "code", auto_map={"AutoModelForCausalLM": "model.Model"})))


@pytest.mark.parametrize("data", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00no"])
def test_broken_weight_files_are_refused(tmp_path: Path, data: bytes) -> None:
    """A cut-off download is named."""
    broken = _model_directory(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelUnsupported, match="fetch the model again"):
        find_model(str(broken))
