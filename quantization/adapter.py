"""The LoRA adapter of a job: attach, read, write. On disk it is what PEFT itself writes and loads."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save

from edge_agent.errors import AdapterMismatch, ModelUnsupported
from edge_agent.files import write_directory
from edge_agent.job import Lora
from quantization.fused import fuse
from quantization.last_layer import ask_last_layer
from quantization.shape import MLP

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def attach_adapter(model: Any, lora: Lora, seed: int, name: str) -> Any:
    """Return the model with a new adapter in 32 bits: A drawn from the seed, B zero, so it changes nothing yet."""
    targets: str | list[str] = "all-linear"
    if lora.targets == "mlp":
        targets = sorted({n.rpartition(".")[2] for n, _ in model.named_modules() if n.rpartition(".")[2] in MLP[:-1]})
        if not targets:
            raise ModelUnsupported(name, "its MLP layers have names that are not known; use --set lora.targets=all")
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng(), _old_name_allowed():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    return _ready(adapted)


def checkpoint_activations(model: Any) -> None:
    """Let the decoder layers of a model with an adapter compute their activations again in the backward pass."""
    decoder = model.base_model.model
    # Renamed in a release that needs Python 3.11; the old name warns there.
    enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def load_adapter(model: Any, directory: Path, name: str = "default") -> Any:
    """Return the model with a saved adapter, for evaluation. Raises AdapterMismatch."""
    if not (directory / CONFIG).is_file() or not (directory / WEIGHTS).is_file():
        raise AdapterMismatch(directory, f"there is no {CONFIG} with {WEIGHTS} in it; give the adapter/ of a finished job")
    with _mismatch(directory), _old_name_allowed():
        adapted = PeftModel.from_pretrained(model, directory, adapter_name=name).eval()
    return _ready(adapted)


def add_adapter(adapted: Any, directory: Path, name: str) -> None:
    """Put one more saved adapter in beside those that are there; it is not active yet. Raises AdapterMismatch."""
    with _mismatch(directory):
        adapted.load_adapter(directory, name)


@contextmanager
def _mismatch(directory: Path) -> Iterator[None]:
    """Raise AdapterMismatch for what PEFT raises on files that do not go with the model."""
    try:
        yield
    except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterMismatch(directory, f"it does not belong to this model ({str(error).splitlines()[0][:200]})") from error


def _ready(adapted: Any) -> Any:
    """Return a model with an adapter that has just been put in, ready to compute with it."""
    fuse(adapted)
    ask_last_layer(adapted.get_decoder())
    return adapted.eval()


@contextmanager
def _old_name_allowed() -> Iterator[None]:
    """PEFT asks models for `is_gradient_checkpointing`, which transformers has renamed and warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def save_adapter(model: Any, directory: Path, model_name: str, adapter: str = "default") -> str:
    """Write the adapter of a name as PEFT's two files, whole or not at all; return the sha256 of the weights."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_state(model, adapter).items()}
    weights = save(state, metadata={"format": "pt"})
    config = model.peft_config[adapter].to_dict() | {"inference_mode": True, "base_model_name_or_path": model_name}
    text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
    write_directory(directory, {WEIGHTS: weights, CONFIG: text.encode()})
    return hashlib.sha256(weights).hexdigest()


def adapter_state(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter by the names that they have on disk."""
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return state


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else getattr(value, "value", str(value))
