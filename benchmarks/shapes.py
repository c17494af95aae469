"""Models of real shapes with random weights, for benchmarks: nothing is downloaded, and no weight is anybody's.

Sizes are those of each model's published config.json, context length apart. The tokenizer is the shipped model's; the ids that it has no
text for stay unused.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

TINY = Path(__file__).parent.parent / "edge_agent" / "demo" / "tiny"
SEED = 30_000
SHARD_BYTES = 2**30
"""Weights of one file at most, so that writing takes as much memory; a larger tensor has a file of its own."""
IDS = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None, "max_position_embeddings": 4096}
"""Of the shipped tokenizer, and the context."""
SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama-100m": (LlamaConfig, {
        "hidden_size": 640, "num_hidden_layers": 12, "intermediate_size": 1728, "num_attention_heads": 10, "vocab_size": 32_000,
        "tie_word_embeddings": False,
    }),
    "smollm2-135m": (LlamaConfig, {
        "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49_152, "tie_word_embeddings": True,
    }),
    "smollm2-360m": (LlamaConfig, {
        "hidden_size": 960, "num_hidden_layers": 32, "intermediate_size": 2560, "num_attention_heads": 15, "num_key_value_heads": 5,
        "vocab_size": 49_152, "tie_word_embeddings": True,
    }),
    "qwen3-0.6b": (Qwen3Config, {
        "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": True,
    }),
    "qwen2.5-0.5b": (Qwen2Config, {
        "hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
        "vocab_size": 151_936, "tie_word_embeddings": True,
    }),
    "llama-3.2-1b": (LlamaConfig, {
        "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128_256, "tie_word_embeddings": True,
    }),
    "qwen2.5-1.5b": (Qwen2Config, {
        "hidden_size": 1536, "num_hidden_layers": 28, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
        "vocab_size": 151_936, "tie_word_embeddings": True,
    }),
    "gemma-2-2b": (Gemma2Config, {
        "hidden_size": 2304, "num_hidden_layers": 26, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "vocab_size": 256_000, "tie_word_embeddings": True,
    }),
    "llama-3-8b": (LlamaConfig, {
        "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128_256, "tie_word_embeddings": False,
    }),
}  # fmt: skip
NAMES = ("tiny", *SHAPES)
"""`tiny` is the shipped model itself. `llama-100m` is nobody's: 100 million parameters, and Llama's first vocabulary."""


def config(name: str) -> PretrainedConfig:
    """Return the configuration of a shape."""
    if name == "tiny":
        return AutoConfig.from_pretrained(TINY)
    kind, sizes = SHAPES[name]
    return kind(**sizes, **IDS, dtype="bfloat16")


def write_model(directory: Path, name: str) -> Path:
    """Write a model of a shape with random weights in bf16, and return where it is; that of `tiny` is where it is shipped.

    Takes the memory of one file at a time, whatever the model's size.
    """
    if name == "tiny":
        return TINY
    directory.mkdir(parents=True)
    made = config(name)
    made.architectures = [AutoModelForCausalLM._model_mapping[type(made)].__name__]
    made.save_pretrained(directory)
    places: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(_shards(made)):
        file = f"model-{number:05}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
        total_bytes += sum(map(_bytes, shard.values()))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_bytes(msgspec.json.encode(index))
    for text in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / text, directory)
    return directory


def _shards(made: PretrainedConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the weights in portions of about `SHARD_BYTES`."""
    shard: dict[str, torch.Tensor] = {}
    for weight_name, weight in random_weights(made):
        if shard and sum(map(_bytes, shard.values())) + _bytes(weight) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[weight_name] = weight
    yield shard


def random_weights(made: PretrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights that a model of this configuration starts from, in bf16, each once, one module at a time."""
    torch.manual_seed(SEED)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    for prefix, module in model.named_modules():
        names = [f"{prefix}.{own}" for own, _ in module.named_parameters(recurse=False)]
        if not names or names[0] in model.all_tied_weights_keys:
            continue
        module.to_empty(device="cpu", recurse=False)
        model._init_weights(module)
        yield from zip(names, [p.detach() for p in module.parameters(recurse=False)], strict=True)
        module.to("meta")


def _bytes(weight: torch.Tensor) -> int:
    return weight.numel() * weight.element_size()
