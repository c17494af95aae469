"""`edge-agent export`: an adapter for use elsewhere: merged into its base model, as PEFT's files, or as a LoRA file of llama.cpp."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch
from bitsandbytes.nn import Params4bit

from edge_agent.adapters.llama_cpp import gguf_lora
from edge_agent.adapters.output import made
from edge_agent.adapters.report import EXPORT_REPORT, Base, Export, Format
from edge_agent.adapters.source import CONFIG, WEIGHTS, Source, base_model
from edge_agent.errors import DiskFull, NoRoom
from edge_agent.files import write_file
from edge_agent.report import Model
from profiles.device import device_profile
from profiles.memory import HostMemory, fix_malloc
from quantization.adapter import load_adapter
from quantization.cache import find_cache
from quantization.load import explained, load_model, load_plain
from quantization.model_files import ModelFiles
from quantization.nf4 import dequantize
from quantization.shape import read_shape

SHARD = "2GB"
"""Of weights in one file, as transformers writes numbers of bytes."""
TEXTS = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "generation_config.json")
"""What beside weights and config.json a merged model needs, as the base model has it."""
SPARE_BYTES = 512 * 2**20
"""Of the process beside the weights: its libraries, and the check."""
CHECKED_TOKENS = 64


def export(source: Source, model: str | None, out: Path, form: Format, base: Base) -> Export:
    """Write an adapter for use elsewhere into a new directory, whole or not at all.

    Merged it is with the weights of the base model in the type of their files, or with `nf4` as they are after their rounding to 4 bits,
    which is what it was trained and measured on. Raises AdapterMismatch, ModelUnsupported, NoRoom, DiskFull or DirectoryUnusable.
    """
    fix_malloc()
    memory, began = HostMemory(), time.monotonic()
    memory.release()
    files = base_model(source, model)
    with made(out) as part:
        dtype, difference = None, None
        if form == "merged":
            dtype, difference = _merged(source, files, base, part)
        elif form == "gguf":
            gguf_lora(source, files, part / "adapter.gguf")
            dtype = "float32"
        else:
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(source.adapter / name, part / name)
        written = sorted(file for file in part.iterdir())
        report = Export(
            format=form, model=Model(files.name, files.fingerprint, files.context_tokens), adapter_sha256=source.sha256,
            base=base if form == "merged" else None, dtype=dtype, difference=difference, files=[file.name for file in written],
            size_bytes=sum(file.stat().st_size for file in written), peak_bytes=memory.peak_bytes(), seconds=time.monotonic() - began,
        )  # fmt: skip
        write_file(part / EXPORT_REPORT, msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    return report


def _merged(source: Source, files: ModelFiles, base: Base, part: Path) -> tuple[str, float]:
    """Write the merged model; return the type of its weights, and how far its logits are from those of base and adapter."""
    _check_room(files, base, part)
    plain = load_plain(files)
    if base == "nf4":
        _round_to_nf4(plain, files, source.vocabulary)
    ids_1T = torch.arange(1, 1 + CHECKED_TOKENS)[None] % plain.get_input_embeddings().num_embeddings
    adapted = load_adapter(plain, source.adapter)
    with explained(files, "it cannot be merged with"), torch.no_grad():
        wanted = adapted(input_ids=ids_1T, use_cache=False).logits.float()
        merged: Any = adapted.merge_and_unload()
        found = merged(input_ids=ids_1T, use_cache=False).logits.float()
    merged.save_pretrained(part, max_shard_size=SHARD)
    for pattern in TEXTS:
        for file in files.path.glob(pattern):
            shutil.copyfile(file, part / file.name)
    return str(merged.dtype).removeprefix("torch."), float((found - wanted).norm() / wanted.norm())


def _round_to_nf4(plain: Any, files: ModelFiles, vocabulary: dict[str, bool]) -> None:
    """Give a model the weights that the same model has in 4 bits."""
    rounded = load_model(files, device_profile("cpu"), cache=find_cache(), **vocabulary)
    for name, weight in rounded.named_parameters():
        if isinstance(weight, Params4bit):
            own = plain.get_parameter(name)
            own.data.copy_(dequantize(weight, own.dtype))


def _check_room(files: ModelFiles, base: Base, part: Path) -> None:
    """Raise NoRoom or DiskFull where the merged model would not fit the memory or the disk."""
    shape = read_shape(files)
    weights = sum(tensor.stored_bytes for tensor in files.tensors)
    # A sum beside its terms, in 32 bits; in NF4 the whole model once more.
    needed = weights + 3 * 4 * shape.largest_elements + SPARE_BYTES + (weights // 2 if base == "nf4" else 0)
    free = psutil.virtual_memory().available
    if needed > free:
        raise NoRoom("memory", free, needed)
    if shutil.disk_usage(part).free < weights + SPARE_BYTES:
        raise DiskFull(str(part), weights + SPARE_BYTES)
