"""What transformers asks while it loads a model in NF4: which layers are quantised, and how one weight is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb4bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from profiles.memory import lacks_memory
from quantization.nf4 import Kernel, quantize
from quantization.vocabulary import Nf4Embedding, Vocabulary

METHOD = "edge_agent_nf4"
"""The name of this quantiser among those of transformers."""


class MemoryLacked(BaseException):
    """Carries an error past transformers, which collects all ordinary ones of a conversion and goes on with the next weight."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Nf4Config(BitsAndBytesConfig):  # type: ignore[misc]
    """How a model is to be quantised."""

    def __init__(self, dtype: torch.dtype, kernel: Kernel, vocabulary: Vocabulary | None, prequantized: bool = False) -> None:
        super().__init__(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
        self.quant_method = METHOD
        self.kernel, self.vocabulary, self.prequantized = kernel, vocabulary, prequantized

    def of_cache(self) -> Nf4Config:
        """Return the same for weights that are quantised already."""
        return Nf4Config(self.bnb_4bit_compute_dtype, self.kernel, self.vocabulary, prequantized=True)


class Nf4Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """The quantiser of bitsandbytes, except that it quantises in slices, on either kernel, and the vocabulary's matrices as well."""

    quantization_config: Nf4Config

    def __init__(self, quantization_config: Nf4Config, **more: Any) -> None:
        super().__init__(quantization_config, **more)
        self.pre_quantized = quantization_config.prequantized

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **more: Any) -> None:
        # Weights are read in the 16 bits that they are quantised from; what is not quantised has the compute type.
        torch.nn.Module.to(model, self.quantization_config.bnb_4bit_compute_dtype)
        if self.quantization_config.vocabulary is not None:
            self.quantization_config.vocabulary.place(model)
        super()._process_model_before_weight_loading(model, device_map, **more)

    def param_needs_quantization(self, model: Any, param_name: str, **more: Any) -> bool:
        """Whether a weight is to be held in NF4."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear4bit | Nf4Embedding) and name == "weight"

    def get_quantize_ops(self) -> Any:
        """Return what quantises a weight."""
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, Any]:
        """Return what puts a weight of the cache together."""
        return {"deserialize": _Deserialize}


@contextmanager
def _memory_lacked() -> Iterator[None]:
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if lacks_memory(error):
            raise MemoryLacked(error) from error
        raise


class _Quantize(Bnb4bitQuantize):  # type: ignore[misc]
    @_memory_lacked()
    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], full_layer_name: str | None = None, model: Any = None, **more: Any) -> dict[str, Any]:
        config = self.hf_quantizer.quantization_config
        found = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module, _ = get_module_from_name(model, name)
            if getattr(module, "source_cls", None) is Conv1D:
                weight = weight.T
            found[name] = quantize(weight, config.bnb_4bit_compute_dtype, config.kernel)
            module._is_hf_initialized = True
        return found


class _Deserialize(Bnb4bitDeserialize):  # type: ignore[misc]
    @_memory_lacked()
    def convert(self, *args: Any, **more: Any) -> Any:
        return super().convert(*args, **more)


register_quantizer(METHOD)(Nf4Quantizer)
