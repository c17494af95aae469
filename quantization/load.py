"""Loads a causal language model in 4 bits: NF4 with double quantisation through bitsandbytes, for any architecture of transformers."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import bitsandbytes
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from edge_agent.errors import ModelUnsupported
from profiles.device import DeviceProfile
from quantization.attention import TREE, Branch, Tree, tree_inputs
from quantization.model_files import ModelFiles
from quantization.shape import read_shape

HEAD_PROBLEM = "its output head scales or caps the logits, which the training loss does not support yet"
BROKEN = (ValueError, OSError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError)
"""What transformers raises on files that it cannot read."""


def load_tokenizer(files: ModelFiles) -> Any:
    """Return the tokenizer, with a padding token. Raises ModelUnsupported."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(files.path, trust_remote_code=False, local_files_only=True)
    except BROKEN as error:
        raise ModelUnsupported(files.name, f"its tokenizer cannot be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelUnsupported(files.name, "its tokenizer has no end-of-sequence token, so an answer could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(files: ModelFiles, device: DeviceProfile) -> Any:
    """Return the model in NF4, frozen and ready to score, generate and be adapted.

    Linear layers but the output head are NF4; embedding, head and norms keep the compute type. Raises ModelUnsupported.
    """
    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, device.compute_dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            files.path, dtype=dtype, quantization_config=quantization, device_map={"": device.torch_device}, use_safetensors=True,
            trust_remote_code=False, local_files_only=True,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except BROKEN as error:
        raise ModelUnsupported(files.name, f"transformers cannot load it: {_first_line(error)}") from error
    model.requires_grad_(False)
    keep_training_kernel(model)
    # Of the model's own generation settings only what ends an answer: penalties and beams would change what is measured.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    _check_quantised(files, model)
    model.eval()
    _check_head(files, model)
    read_trees(model)
    return model


def _check_quantised(files: ModelFiles, model: torch.nn.Module) -> None:
    """Architectures with linear layers of their own would stay unquantised in silence."""
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    held = sum(m.weight.quant_state.shape.numel() for m in layers)
    if held < 0.9 * sum(t.elements for t in read_shape(files).linear):
        raise ModelUnsupported(files.name, "its linear layers cannot be held in 4 bits")


def keep_training_kernel(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking weights in place for CPUs with AVX512-BF16.

    With it, one forward pass without gradient in `.eval()` leaves a model whose backward pass gives no gradient to the layer's
    input: evaluating and then training would be silently wrong.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


@torch.no_grad()
def _check_head(files: ModelFiles, model: Any) -> None:
    """The engine applies the output head to chosen positions itself; a model whose head does more must not pass unnoticed."""
    config = model.config.get_text_config()
    if any(getattr(config, name, None) not in (None, 1, 1.0) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")):
        raise ModelUnsupported(files.name, HEAD_PROBLEM)
    ids = torch.arange(1, 9, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    whole = model(input_ids=ids).logits.float()
    parts = model.get_output_embeddings()(model.get_decoder()(input_ids=ids).last_hidden_state).float()
    if whole.shape != parts.shape or not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2):
        raise ModelUnsupported(files.name, HEAD_PROBLEM)


@torch.no_grad()
def read_trees(model: Any) -> None:
    """Give the model the attention over trees, unless it then reads two rows with one beginning otherwise than each alone.

    So do architectures whose layers are not all attention, or whose attention transformers does not let one replace.
    """
    decoder, config = model.get_decoder(), model.config.get_text_config()
    own, windowed = config._attn_implementation, _windowed(config)
    ids_T = torch.arange(1, 13, device=model.device) % model.get_input_embeddings().num_embeddings
    rows_L = torch.arange(8, device=model.device), torch.tensor([0, 1, 2, 3, 8, 9, 10, 11], device=model.device)

    def alone() -> torch.Tensor:
        return torch.cat([decoder(input_ids=ids_T[None, row_L], use_cache=False).last_hidden_state[0] for row_L in rows_L])

    wanted = alone()
    tolerance = 1e-3 if wanted.dtype == torch.float32 else 5e-2
    tree = Tree((Branch(0, 8, 0, slice(0, 8)), Branch(8, 12, 4, rows_L[1])))
    model.set_attn_implementation(TREE)
    with suppress(*BROKEN):
        positions_T = torch.tensor([*range(8), *range(4, 8)], device=model.device)
        together = decoder(**tree_inputs(ids_T, positions_T, tree), use_cache=False).last_hidden_state[0][torch.cat(rows_L)]
        same = max((found - wanted).norm() / wanted.norm() for found in (together, alone())) < tolerance
        if same and (not windowed or config.sliding_window in tree.windows):
            return
    model.set_attn_implementation(own)


def _windowed(config: Any) -> bool:
    """Whether there are layers that see the last tokens only. A check on rows shorter than their window would not notice a lost one."""
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) is not None and (kinds is None or "sliding_attention" in kinds)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
