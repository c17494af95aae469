"""Writes an adapter as a LoRA file of llama.cpp (GGUF), which it applies to a base model of its own by `--lora`.

Tensors are named by the table of the package `gguf`, which is llama.cpp's own writer, and stay in 32 bits. Where llama.cpp keeps the
rows of queries and keys in another order than transformers, the rows of B are put into that order.

Shapes: R rank, I inputs, O outputs, H heads, E size of a head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from edge_agent.adapters.source import PREFIX, WEIGHTS, A, B, Source
from edge_agent.errors import ModelUnsupported
from quantization.model_files import ModelFiles

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3",
}  # fmt: skip
"""What llama.cpp calls the architectures of transformers whose matrices it has one to one."""
REORDERED = ("llama", "mistral")
"""Those of which it turns queries and keys in pairs of neighbours, where transformers turns the first half with the second."""


def gguf_lora(source: Source, files: ModelFiles, file: Path) -> None:
    """Write the file. Raises ModelUnsupported where llama.cpp has the architecture's matrices in another form."""
    import gguf  # an extra: the other formats do without

    config = files.config.get("text_config") or files.config
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ModelUnsupported(files.name, f"a LoRA file of llama.cpp is written for {known}, not for {kind!r}; take --format merged")
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[ARCHITECTURES[kind]]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(file, ARCHITECTURES[kind])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # llama.cpp divides it by the rank, whatever PEFT does.
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, source.lora.scaling * source.lora.r)
    writer.add_name(Path(files.name).name)
    weights = load_file(source.adapter / WEIGHTS)
    for module in source.matrices:
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ModelUnsupported(files.name, f"llama.cpp has no name for its matrix {module}; take --format merged")
        a_RI, b_OR = (weights[f"{PREFIX}{module}{end}"].float() for end in (A, B))
        if kind in REORDERED:
            b_OR = _reordered(b_OR, module, config)
        writer.add_tensor(f"{name}.lora_a", a_RI.contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", b_OR.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _reordered(b_OR: torch.Tensor, module: str, config: dict[str, Any]) -> torch.Tensor:
    """Return the rows in llama.cpp's order: of every head the numbers of its two halves by turns."""
    queries = config["num_attention_heads"]
    heads = {"q_proj": queries, "k_proj": config.get("num_key_value_heads") or queries}.get(module.rpartition(".")[2])
    if heads is None:
        return b_OR
    return b_OR.view(heads, 2, -1, b_OR.shape[1]).transpose(1, 2).reshape(b_OR.shape)
