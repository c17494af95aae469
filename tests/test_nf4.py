"""NF4 in plain PyTorch against bitsandbytes: the same bytes mean the same weights, and training needs no kernel of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch.autograd.graph import saved_tensors_hooks

from edge_agent.errors import JobSchema
from edge_agent.job import Lora
from edge_agent.training.head import weighted_loss
from edge_agent.training.packing import answer_hidden, pack
from profiles.device import device_profile
from quantization import nf4
from quantization.adapter import attach_adapter, load_adapter, save_adapter
from quantization.load import load_model
from quantization.model_files import find_model
from quantization.nf4 import (
    KERNEL_VARIABLE,
    Kernel,
    TorchLinear,
    choose_kernel,
    choose_with_reason,
    dequantize,
    dequantize_rows,
    disagreement,
    kernel_of,
    quantize,
    use_kernel,
)
from quantization.smoke import try_out

torch.set_num_threads(1)
SHAPES = [(640, 1728), (97, 128), (1000, 896), (33, 66), (5, 8192)]
TYPES = [torch.float32, torch.bfloat16]


def _weight(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02


def _theirs(weight: torch.Tensor) -> Params4bit:
    """The matrix as bitsandbytes itself quantises it from bfloat16."""
    return Params4bit(weight.bfloat16(), compress_statistics=True, quant_type="nf4").to("cpu")


@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_bytes_are_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    """Taken slice by slice: bytes, scales and their mean, bit for bit, from 32 bits as from 16."""
    weight = _weight(shape)
    wanted = _theirs(weight)
    for given in (weight, weight.bfloat16()):
        found = quantize(given, torch.float32, "bitsandbytes")
        assert torch.equal(found.data, wanted.data)
        assert torch.equal(found.quant_state.absmax, wanted.quant_state.absmax)
        assert torch.equal(found.quant_state.state2.absmax, wanted.quant_state.state2.absmax)
        assert torch.equal(found.quant_state.offset, wanted.quant_state.offset)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_torch_quantises_to_the_same_bytes(shape: tuple[int, int]) -> None:
    """Bit for bit but for scales in the middle between two bytes, of which either neighbour may be taken."""
    found, wanted = quantize(_weight(shape), torch.float32, "torch"), _theirs(_weight(shape))
    assert torch.equal(found.data, wanted.data)
    assert torch.equal(found.quant_state.state2.absmax, wanted.quant_state.state2.absmax)
    apart = (found.quant_state.absmax.int() - wanted.quant_state.absmax.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.02


def test_a_block_of_zeros_stays_zero() -> None:
    """It has no scale to divide by."""
    weight = _weight((64, 256))
    weight[3] = 0
    for kernel in ("bitsandbytes", "torch"):
        scale = dequantize(quantize(weight, torch.float32, kernel), torch.float32)[3].abs().max()  # type: ignore[arg-type]
        assert scale < 1e-6


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_torch_dequantises_to_the_same_weights(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Bit for bit, double quantisation included; whole, in slices by bitsandbytes' kernel, and single rows."""
    weight = _theirs(_weight(shape))
    weight.quant_state.dtype = dtype
    wanted = dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(dequantize(weight, dtype, "torch"), wanted)
    assert torch.equal(dequantize(weight, dtype, "bitsandbytes"), wanted)
    ids = torch.tensor([[3, 1, 3], [0, shape[0] - 1, 2]])
    assert torch.equal(dequantize_rows(weight, ids, dtype), wanted[ids])


@pytest.mark.parametrize("width", [32, 48, 80, 96])
def test_rows_that_share_a_block_are_not_left_to_bitsandbytes(width: int) -> None:
    """Of such matrices its kernel for CPUs with AVX-512 gives wrong weights; ours have the error of 4 bits, in a layer too."""
    weight = _weight((64, width))
    layer = Linear4bit(width, 64, bias=False, compute_dtype=torch.float32, device="meta")
    layer.weight = quantize(weight, torch.float32, "bitsandbytes")
    use_kernel(layer, "bitsandbytes")
    for found in (dequantize(layer.weight, torch.float32, "bitsandbytes"), layer(torch.eye(width)).T):
        assert (found - weight).norm() < 0.11 * weight.norm()


def test_trial_decides_on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of bitsandbytes are taken where a trial of them goes well, and the environment may decide otherwise."""
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    assert disagreement("cpu") is None
    assert choose_kernel("cpu") == "bitsandbytes"
    monkeypatch.setenv(KERNEL_VARIABLE, "torch")
    assert choose_kernel("cpu") == "torch"


def test_unknown_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong name is an error that names the variable, not a trial."""
    monkeypatch.setenv(KERNEL_VARIABLE, "pytorch")
    with pytest.raises(JobSchema, match=f"{KERNEL_VARIABLE}: 'pytorch' is no kernel"):
        choose_kernel("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="THERE IS A GPU: the trial on a device without one did not run")
def test_trial_that_dies_leaves_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that tries a GPU for which nothing was built ends in an error, and this one goes on."""
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)
    kernel, why = choose_with_reason("cuda")
    assert kernel == "torch"
    assert re.match("a trial of bitsandbytes ended with 1: .*(CUDA|NVIDIA)", why)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kernel", get_args(Kernel))
def test_matrix_is_tried_out_on_every_kernel(kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `edge-agent doctor` has computed is right on both; where a layer gives another gradient, that is told."""
    monkeypatch.setenv(KERNEL_VARIABLE, kernel)
    tried = try_out("cpu", dtype)
    assert (tried["kernel"], tried["why"], tried["wrong"]) == (kernel, f"{KERNEL_VARIABLE} says so", "")
    wrong = staticmethod(lambda ctx, grad_BO: (grad_BO @ dequantize(ctx.weight, grad_BO.dtype) * 1.1, None))
    monkeypatch.setattr(nf4._Product, "backward", wrong)
    assert try_out("cpu", dtype)["wrong"] == ("the gradient is off by 0.1" if kernel == "torch" else "")


def _adapted(tiny_model: Path, kernel: str, monkeypatch: pytest.MonkeyPatch, adapter: Path | None = None) -> Any:
    monkeypatch.setenv(KERNEL_VARIABLE, kernel)
    model: Any = load_model(find_model(str(tiny_model)), device_profile("cpu"))
    assert kernel_of(model) == kernel
    if adapter is not None:
        return load_adapter(model, adapter)
    model = attach_adapter(model, Lora(dropout=0.0), 3, "tiny")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return model


def _loss(model: Any) -> torch.Tensor:
    packed = pack(model, [(list(range(5, 45)), list(range(50, 70)))], 1)
    ones = torch.ones(20)
    return weighted_loss(model.train(), answer_hidden(model, packed), packed.target_ids_N, ones, ones / 2, 7).total


def test_plain_torch_trains_as_bitsandbytes_does(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of every adapter, where both have the same weights to the choice between two neighbouring scales."""
    found = []
    for kernel in ("bitsandbytes", "torch"):
        model = _adapted(tiny_model, kernel, monkeypatch)
        loss = _loss(model)
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (loss, gradient), (other_loss, other_gradient) = found
    torch.testing.assert_close(other_loss, loss, rtol=1e-3, atol=0)
    assert (other_gradient - gradient).norm() < 1e-2 * gradient.norm()


def test_plain_torch_keeps_no_dequantised_weight(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the backward pass waits for has the size of a weight; there are such weights, and gradients pass through them."""
    model = _adapted(tiny_model, "torch", monkeypatch)
    layers = [m for m in model.modules() if isinstance(m, TorchLinear)]
    assert len(layers) == 4 * 7
    weights = {tuple(m.weight.quant_state.shape) for m in layers}
    kept: list[tuple[int, ...]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _loss(model)
    assert kept
    assert not weights & (set(kept) | {shape[::-1] for shape in kept})
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_A" in n)


def test_adapter_of_one_kernel_is_read_on_the_other(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved under plain PyTorch, it is what bitsandbytes' layers take, and the model answers alike."""
    with torch.no_grad():
        model = _adapted(tiny_model, "torch", monkeypatch)
        save_adapter(model, tmp_path / "adapter", "tiny")
        wanted = _loss(model.eval())
        found = _loss(_adapted(tiny_model, "bitsandbytes", monkeypatch, tmp_path / "adapter").eval())
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)
