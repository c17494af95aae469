"""The fused LoRA layer on an NF4 matrix gives what PEFT's own layer gives, with less memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear4bit

from edge_agent.job import Lora
from profiles.device import device_profile
from quantization.adapter import attach_adapter, checkpoint_activations, load_adapter, save_adapter
from quantization.fused import FusedLinear4bit, fuse
from quantization.load import load_model
from quantization.model_files import find_model


class Two(torch.nn.Module):
    """Two layers, so that the second one's gradient has to pass through its frozen matrix."""

    is_loaded_in_4bit = True  # what PEFT goes by

    def __init__(self, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.first, self.second = (
            bitsandbytes.nn.Linear4bit(*sizes, bias=bias, compute_dtype=dtype, quant_type="nf4") for sizes in ((64, 128), (128, 64))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.nn.functional.silu(self.first(x)))


def _models(dtype: torch.dtype, bias: bool = False, dropout: float = 0.0) -> tuple[Any, Any]:
    """The same weights as PEFT has them, and fused."""
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        model = get_peft_model(
            Two(dtype, bias).to(dtype).to("cpu"), LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["first", "second"])
        )
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape) / 8
        models.append(model)
    fuse(models[1])
    assert sum(isinstance(m, FusedLinear4bit) for m in models[1].modules()) == 2
    return models[0], models[1]


def _run(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of the adapter."""
    x = x.clone().requires_grad_()
    torch.manual_seed(2)
    y = model(x)
    y.float().square().mean().backward()
    return [y, x.grad, *(p.grad for _, p in sorted(model.named_parameters()) if p.requires_grad)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fused_layers_give_the_gradients_of_peft(dropout: float, bias: bool) -> None:
    """Outputs and all gradients to 1e-5 in 32 bits, the same dropout included."""
    own, fused = _models(torch.float32, bias, dropout)
    x = torch.randn(2, 9, 64)
    for wanted, found in zip(_run(own.train(), x), _run(fused.train(), x), strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    for wanted, found in zip(_run(own.eval(), x), _run(fused.eval(), x), strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_fused_layers_round_no_worse_in_16_bits() -> None:
    """With activations in bfloat16 every result is about as near to that in 32 bits as PEFT's is."""
    x = torch.randn(2, 9, 64)
    exact = _run(_models(torch.float32)[1], x)
    own, fused = _models(torch.bfloat16)
    for wanted, peft, found in zip(exact, _run(own, x.bfloat16()), _run(fused, x.bfloat16()), strict=True):
        assert found.dtype == peft.dtype
        assert (found.float() - wanted).norm() <= 2 * (peft.float() - wanted).norm() + 1e-3 * wanted.norm()


def test_fused_layers_leave_the_rest_to_peft() -> None:
    """Without the adapter, or unloaded again, the layer is the frozen matrix."""
    own, fused = _models(torch.float32)
    x = torch.randn(3, 64)
    with own.disable_adapter(), fused.disable_adapter():
        frozen = fused(x)
        torch.testing.assert_close(frozen, own(x))
    assert (fused(x) - frozen).norm() > 0.1 * frozen.norm()
    unloaded = fused.unload()
    assert not any(isinstance(m, Linear4bit) for m in unloaded.modules())
    torch.testing.assert_close(unloaded(x), frozen)


def test_adapters_of_a_model_are_fused(tiny_model: Path, tmp_path: Path) -> None:
    """Every NF4 layer, attached or loaded from its files: a layer that PEFT names otherwise would be its own in silence."""
    files = find_model(str(tiny_model))
    model = attach_adapter(load_model(files, device_profile("cpu")), Lora(), 3, "tiny")
    assert sum(type(m) is FusedLinear4bit for m in model.modules()) == 4 * 7
    save_adapter(model, tmp_path / "adapter", "tiny")
    loaded = load_adapter(model.unload(), tmp_path / "adapter")
    assert sum(type(m) is FusedLinear4bit for m in loaded.modules()) == 4 * 7


def test_fused_layers_keep_the_input_once() -> None:
    """Two layers that read the same activations in 16 bits keep one copy of them, and none in 32 bits."""
    _, fused = _models(torch.bfloat16)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    layer = fused.base_model.model.first
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x), layer(x)
    large = [t for t in kept.values() if t.numel() == x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


def test_a_layer_computed_again_leaves_its_last_product_out(tiny_model: Path) -> None:
    """In the backward pass of a checkpointed layer nothing reads what its last matrix makes."""
    model = attach_adapter(load_model(find_model(str(tiny_model)), device_profile("cpu")), Lora(), 3, "tiny")
    checkpoint_activations(model)
    made: Counter[str] = Counter()
    layers = {name: module for name, module in model.get_decoder().layers[0].named_modules() if isinstance(module, FusedLinear4bit)}
    for name, layer in layers.items():
        layer.base_layer.register_forward_hook(lambda *_, name=name: made.update([name]))
    model.train()
    model.get_decoder()(input_ids=torch.arange(9)[None], use_cache=False).last_hidden_state.sum().backward()
    assert made == dict.fromkeys(layers, 2) | {"mlp.down_proj": 1}
