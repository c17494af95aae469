"""A model loaded in 4 bits once, so that the cache has it: `python -m quantization.prequantise MODEL DEVICE [SETTING…]`.

The settings are those of `load_model` that are to be true.
Prints a JSON list of the code of what went wrong, empty where nothing did, and of its text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch

from edge_agent.errors import DeviceMissing, EdgeAgentError
from profiles.device import detect_profile
from profiles.memory import lacks_memory
from quantization.cache import find_cache
from quantization.entries import entries_of
from quantization.load import load_model, load_tokenizer
from quantization.model_files import find_model


def prequantise(model: str, wanted: str, vocabulary: Sequence[str]) -> None:
    """Load a model for a device, through the cache that the environment names. Raises an EdgeAgentError."""
    files, device = find_model(model), detect_profile(wanted)
    if device.torch_device == "cuda" and not torch.cuda.is_available():
        raise DeviceMissing("this PyTorch cannot use the GPU that is there")
    load_tokenizer(files)
    load_model(files, device, cache=find_cache(), **dict.fromkeys(vocabulary, True))


def main(model: str, wanted: str, *vocabulary: str) -> tuple[str, str]:
    """Return the code and the text of what went wrong, empty where nothing did."""
    try:
        prequantise(model, wanted, vocabulary)
    except EdgeAgentError as error:
        return error.code, str(error)
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        return "oom_device", "there is too little memory for it now"
    cache = find_cache()
    there = cache is not None and entries_of(find_model(model), cache.directory.parent)
    return (
        ("", "")
        if there
        else ("internal", "the cache did not take it: it, or the disk, has no room, or the architecture has other names for its weights")
    )


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(main(*sys.argv[1:])))
