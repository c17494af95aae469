"""Loads a causal language model in 4 bits: NF4 with double quantisation through bitsandbytes, for any architecture of transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch.utils.hooks import RemovableHandle
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from edge_agent.errors import ModelUnsupported
from profiles.device import DeviceProfile
from profiles.memory import lacks_memory, without_holes
from quantization.attention import TREE, Branch, Tree, shortest_window, tree_inputs
from quantization.cache import ModelCache, own_weights
from quantization.last_layer import ask_last_layer
from quantization.logits import Finish
from quantization.model_files import ModelFiles, weight_files
from quantization.nf4 import choose_kernel, use_kernel
from quantization.quantizer import MemoryLacked, Nf4Config
from quantization.shape import read_shape
from quantization.stored import Damaged, StoredTensor, stored_tensors
from quantization.vocabulary import find_vocabulary

log = logging.getLogger(__name__)

HEAD_PROBLEM = "it does more with its logits than the training loss knows: a factor, and a bound by a hyperbolic tangent"
BROKEN = (
    ValueError, OSError, LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError, AssertionError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip
"""What transformers and PyTorch raise on files that they cannot read, and on sizes that do not go together."""


@contextmanager
def explained(files: ModelFiles, problem: str) -> Iterator[None]:
    """Raise ModelUnsupported for what libraries raise on a model that they cannot use; a lack of memory stays one."""
    try:
        yield
    except BROKEN as error:
        if lacks_memory(error):
            raise
        raise ModelUnsupported(files.name, f"{problem}: {_brief(error)}") from error


def load_tokenizer(files: ModelFiles) -> Any:
    """Return the tokenizer, with a padding token. Raises ModelUnsupported."""
    with explained(files, "its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(files.path, trust_remote_code=False, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ModelUnsupported(files.name, "its tokenizer has no end-of-sequence token, so an answer could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    files: ModelFiles, device: DeviceProfile, *, quantized_head: bool = False, embedding_on_host: bool = False,
    cache: ModelCache | None = None,
) -> Any:  # fmt: skip
    """Return the model in NF4, frozen and ready to score, generate and be adapted.

    Linear layers are NF4. The embedding and the output head keep the type of their file, or the compute type where that is narrower; with
    `quantized_head` both are NF4. With `embedding_on_host` an embedding that is not the head's matrix as well stays in its file. Norms and
    biases have the compute type. Weights are read and quantised one by one, or read from the cache if they are there. Raises
    ModelUnsupported.
    """
    transformers_logging.disable_progress_bar()
    with explained(files, "it cannot be loaded"), without_holes():
        model = _load(files, device, quantized_head, embedding_on_host, cache)
    model.requires_grad_(False)
    _check_quantised(files, model)
    model.eval()
    _check_head(files, model)
    read_trees(model)
    return model


def load_plain(files: ModelFiles) -> Any:
    """Return the model as its files have it, on the processor, to be merged with an adapter. Raises ModelUnsupported."""
    transformers_logging.disable_progress_bar()
    with explained(files, "it cannot be loaded"):
        config = AutoConfig.from_pretrained(files.path, trust_remote_code=False, local_files_only=True)
        kind, config = _architecture(config)
        model, report = kind.from_pretrained(
            files.path, config=config, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):
            raise Damaged(f"its files lack {', '.join(missing[:3])}; fetch the model again")
    return model.requires_grad_(False).eval()


def _load(files: ModelFiles, device: DeviceProfile, quantized_head: bool, embedding_on_host: bool, cache: ModelCache | None) -> Any:
    dtype, kernel = getattr(torch, device.compute_dtype), choose_kernel(device.torch_device)
    config = AutoConfig.from_pretrained(files.path, trust_remote_code=False, local_files_only=True)
    checkpoint = stored_tensors(weight_files(files.path))
    vocabulary = find_vocabulary(checkpoint, config.get_text_config(), quantized_head, embedding_on_host)
    settings = Nf4Config(dtype, kernel, vocabulary)
    key = cache and cache.key(
        files, device=(device.torch_device, device.compute_dtype), kernel=kernel, head=quantized_head, host=embedding_on_host
    )
    model: Any = cache and key and _read(cache, key, config, settings, device)
    if model is None:
        model = _build(config, checkpoint, device, settings)
        if cache and key and not model._weight_conversions:  # weights that were renamed would not be found by their names
            cache.write(key, own_weights(model))
    model.config.dtype, model.config.name_or_path, model.name_or_path = dtype, str(files.path), str(files.path)
    use_kernel(model, kernel)
    # Of the model's own generation settings only what ends an answer: penalties and beams would change what is measured.
    model.generation_config = GenerationConfig(eos_token_id=_ends(files, model))
    return model


def _build(config: Any, weights: dict[str, StoredTensor], device: DeviceProfile, settings: Nf4Config) -> Any:
    """Return the model of a configuration with these weights. Raises Damaged where some are missing."""
    kind, config = _architecture(config)
    try:
        model, report = kind.from_pretrained(
            None, config=config, state_dict=weights, dtype=torch.bfloat16, quantization_config=settings,
            device_map={"": device.torch_device}, local_files_only=True, output_loading_info=True,
        )  # fmt: skip
    except MemoryLacked as lack:
        raise lack.error from None
    if missing := sorted(report["missing_keys"]):  # transformers would have drawn them at random
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise Damaged(f"its files lack {', '.join(missing[:3])}{more}; fetch the model again")
    return model


def _read(cache: ModelCache, key: str, config: Any, settings: Nf4Config, device: DeviceProfile) -> Any:
    """Return the model as the cache has it, None where it has none that is whole."""
    weights = cache.read(key)
    if weights is None:
        return None
    try:
        return _build(config, weights, device, settings.of_cache())
    except BROKEN as error:
        if lacks_memory(error):
            raise
        cache.discard(key)
        return None


def _architecture(config: Any) -> tuple[Any, Any]:
    """Return the class of a causal language model and its configuration, of which models of text and images have one inside."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    inner = config.sub_configs.get("text_config")
    return kind, config.get_text_config() if inner is not None and kind.config_class is inner else config


def _ends(files: ModelFiles, model: Any) -> Any:
    """Return the tokens that a model's files say end an answer."""
    try:
        return GenerationConfig.from_pretrained(files.path, local_files_only=True).eos_token_id
    except OSError:
        return model.generation_config.eos_token_id


def _check_quantised(files: ModelFiles, model: torch.nn.Module) -> None:
    """Architectures with linear layers of their own would stay unquantised in silence."""
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    held = sum(m.weight.quant_state.shape.numel() for m in layers)
    if held < 0.9 * sum(t.elements for t in read_shape(files).linear):
        raise ModelUnsupported(files.name, "its linear layers cannot be held in 4 bits")


@torch.no_grad()
def _check_head(files: ModelFiles, model: Any) -> None:
    """The engine applies the output head to chosen positions itself; a model whose head does more must not pass unnoticed."""
    finish = Finish.of(model.config.get_text_config())
    ids = torch.arange(1, 9, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    # Without a cache: its keys and values would lie above the dequantised weights of their layers, whose pages then stay.
    whole = model(input_ids=ids, use_cache=False).logits.float()
    parts = finish(model.get_output_embeddings()(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state).float())
    if whole.shape != parts.shape or not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2):
        raise ModelUnsupported(files.name, HEAD_PROBLEM)


@torch.no_grad()
def read_trees(model: Any) -> None:
    """Give the model the attention over trees, unless it then reads two rows with one beginning otherwise than each alone.

    So do architectures whose layers are not all attention, or whose attention transformers does not let one replace. A line in the log
    says why it was not given. A lack of memory is raised.
    """
    decoder, config = model.get_decoder(), model.config.get_text_config()
    own = config._attn_implementation
    ids_T = torch.arange(1, 13, device=model.device) % model.get_input_embeddings().num_embeddings
    rows_L = torch.arange(8, device=model.device), torch.tensor([0, 1, 2, 3, 8, 9, 10, 11], device=model.device)

    def alone() -> torch.Tensor:
        return torch.cat([decoder(input_ids=ids_T[None, row_L], use_cache=False).last_hidden_state[0] for row_L in rows_L])

    wanted = alone()
    tolerance = 1e-3 if wanted.dtype == torch.float32 else 5e-2
    tree = Tree((Branch(0, 8, 0, slice(0, 8)), Branch(8, 12, 4, rows_L[1])))
    some, of_rows = Tree(tree.branches, torch.tensor([6, 7, 10, 11], device=model.device)), [6, 7, 14, 15]
    hooks: list[RemovableHandle] = []
    try:
        model.set_attn_implementation(TREE)
        hooks = ask_last_layer(decoder)
        positions_T = torch.tensor([*range(8), *range(4, 8)], device=model.device)
        read, asked = (decoder(**tree_inputs(ids_T, positions_T, t), use_cache=False).last_hidden_state[0] for t in (tree, some))
        pairs = (read[torch.cat(rows_L)], wanted), (asked[some.asked_A], wanted[of_rows]), (alone(), wanted)
        apart = float(torch.stack([(found - own).norm() / own.norm() for found, own in pairs]).max())  # which is not a number if one is not
        # Rows shorter than a window would not show that it is lost.
        if apart < tolerance and shortest_window(config) in (None, *tree.windows):
            return
        why = f"rows differ by {apart:.1e}, windows seen are {tree.windows}"
    except BROKEN as error:
        if lacks_memory(error):
            raise
        why = _brief(error)
    finally:
        for hook in hooks:
            hook.remove()
    model.set_attn_implementation(own)
    log.warning("trees_not_read model=%s why=%r", model.name_or_path, why)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
