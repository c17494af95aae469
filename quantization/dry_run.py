"""A model without its weights, and the bytes that its work would take: the real code runs on tensors that have sizes and no memory.

The model is built on PyTorch's meta device and given fake tensors, so nothing is loaded and nothing computed. Every tensor that the work
makes is counted by its storage until it is freed. What kernels take besides, out of PyTorch's sight, is added by name.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, GenerationConfig

from profiles.device import DeviceProfile
from profiles.memory import MMAP_THRESHOLD_BYTES
from quantization.nf4 import BLOCK, SCALES, Kernel, choose_kernel, use_kernel
from quantization.vocabulary import NarrowHead, Nf4Embedding, Nf4Head, Vocabulary

aten = torch.ops.aten
PAGE_BYTES = 4096


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that were made under it and not freed yet, in parts: `peaks` has the most of each part.

    Blocks of the heap that are freed stay with the process, where later ones take their place; so of those the most so far counts.
    Values that the work asks for are not known: a number is 1, and where it asks which elements are not zero it is told all or none.
    """

    def __init__(self, rounded: Callable[[int], int], all_nonzero: bool, heap_below_bytes: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._all_nonzero, self._heap_below_bytes = all_nonzero, heap_below_bytes
        self._mapped_bytes = self._heap_bytes = self._most_heap_bytes = 0
        self.peaks: dict[str, int] = {}
        self._part = ""
        self._held: set[int] = set()
        self._rounded = rounded

    @property
    def now_bytes(self) -> int:
        """What the process holds, holes of the heap included."""
        return self._mapped_bytes + self._most_heap_bytes

    def trim(self) -> None:
        """Forget the holes of the heap: what is free at its end goes back to the system."""
        self._most_heap_bytes = self._heap_bytes

    def begin(self, part: str) -> None:
        """Count what follows into a part."""
        self._part = part
        self.peaks[part] = max(self.peaks.get(part, 0), self.now_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = self._answer(func, args)
        if made is None:
            made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        taken = self.now_bytes + _hidden_bytes(func, args, made)
        self.peaks[self._part] = max(self.peaks.get(self._part, 0), taken)
        return made

    def _answer(self, func: Any, args: Any) -> Any:
        """Return what stands for the result of an operation that needs values, or a generator; None for all others."""
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is aten.exponential_.default:
            return args[0]
        if func is aten.nonzero.default:
            found = args[0].numel() if self._all_nonzero else 0
            return torch.empty(found, args[0].dim(), dtype=torch.long, device=args[0].device)
        return None

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._held:
            size = self._rounded(storage.nbytes())
            self._held.add(key)
            self._add(size)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._held.discard(key)
        self._add(-size)

    def _add(self, size: int) -> None:
        if abs(size) < self._heap_below_bytes:
            self._heap_bytes += size
            self._most_heap_bytes = max(self._most_heap_bytes, self._heap_bytes)
        else:
            self._mapped_bytes += size


def _hidden_bytes(func: Any, args: Any, made: Any) -> int:
    """Bytes that a kernel takes while it runs and that no tensor of PyTorch's dispatcher shows."""
    if func is torch.ops.bitsandbytes.gemm_4bit.default:
        # Without gradient a matrix is dequantised inside of the product, with its scales in 32 bits.
        weights = math.prod(args[2])
        return int(weights * args[0].element_size() + 4 * (weights // BLOCK))
    if func is aten.logsumexp.default:
        # The exponentials of all elements exist before they are added up.
        return int(args[0].nbytes)
    return 0


def _host_block(size: int) -> int:
    """Bytes of a block of the C library: whole pages for large ones, which are mapped alone (profiles/memory.py)."""
    return -(-(size + PAGE_BYTES) // PAGE_BYTES) * PAGE_BYTES if size >= MMAP_THRESHOLD_BYTES else -(-(size + 72) // 16) * 16


def _cuda_block(size: int) -> int:
    """Bytes of a block of PyTorch's CUDA allocator: multiples of 512 bytes, of 2 MiB from 10 MiB on."""
    unit = 2 * 2**20 if size >= 10 * 2**20 else 512
    return -(-size // unit) * unit


def takes_trees(config: Any) -> bool:
    """Whether an architecture reads rows as a tree, as far as it says without weights; `read_trees` makes sure of it with them."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    layers = getattr(config.get_text_config(), "layer_types", None) or ()
    known = all(layer in ("full_attention", "sliding_attention") for layer in layers)
    return kind is not None and kind._supports_attention_backend and not kind._is_stateful and known


def ghost_model(
    config: Any, device: DeviceProfile, layers: int | None = None, stored: torch.dtype = torch.bfloat16, *,
    quantized_head: bool = False, embedding_on_host: bool = False, kernel: Kernel | None = None,
) -> Any:  # fmt: skip
    """Return the causal language model of a configuration as the trainer holds it (quantization/load.py), on the meta device.

    With `layers` it has only so many of them. `stored` is the type of the vocabulary's matrices in their file. `kernel` is
    what computes in 4 bits; without it what does on a processor here, and bitsandbytes elsewhere.
    """
    config = _with_layers(config, layers)
    dtype = getattr(torch, device.compute_dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.requires_grad_(False)
        tied = bool(model.all_tied_weights_keys)
        Vocabulary(stored, quantized_head).place(model)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            if isinstance(module, Nf4Head | Nf4Embedding):
                module.weight = _packed(*_nf4_weight(module.weight, dtype))
            elif type(module) is nn.Linear and module is not head:
                model.set_submodule(name, _nf4_layer(module, dtype))
        if tied:
            head.weight = embedding.weight
        elif embedding_on_host:
            model.set_input_embeddings(_Elsewhere(embedding.embedding_dim, dtype))
    if isinstance(head, NarrowHead | Nf4Head):
        _cut(head)
    use_kernel(model, kernel or (choose_kernel("cpu") if device.kind == "cpu" else "bitsandbytes"))
    model.is_loaded_in_4bit = True
    model.generation_config = GenerationConfig()
    return model.requires_grad_(False).eval()


def _cut(head: Any) -> None:
    """Let a head that is used in slices use the first two and the last: the others are like the second, and there may be hundreds."""
    slices = head.slices

    def few(dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        step = 0
        for rows, part_RD in islice(slices(dtype), 2):
            step = max(step, len(part_RD))
            yield rows, part_RD
        if rest := head.out_features % step:
            last_RD = part_RD[:rest]  # of a slice that has memory of its own, so has the last
            yield slice(head.out_features - rest, head.out_features), last_RD if isinstance(head, NarrowHead) else last_RD.clone()

    head.slices = few


class _Elsewhere(nn.Module):
    """An embedding that is not held: its rows come from a file or from the host."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._width, self._dtype = width, dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows for the ids in the compute type."""
        return torch.empty((*ids.shape, self._width), dtype=self._dtype, device=ids.device)


def _with_layers(config: Any, layers: int | None) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return config


def _nf4_layer(linear: nn.Linear, dtype: torch.dtype) -> Any:
    """Return a layer of bitsandbytes with the bytes of a quantised weight."""
    layer = bitsandbytes.nn.Linear4bit.__new__(bitsandbytes.nn.Linear4bit)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features, layer.bias = linear.in_features, linear.out_features, linear.bias
    layer.compute_dtype, layer.compute_type_is_set, layer.quant_storage = dtype, True, torch.uint8
    layer.weight = _packed(*_nf4_weight(linear.weight, dtype))
    layer.quant_state = layer.weight.quant_state
    return layer


def _nf4_weight(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, QuantState]:
    """Return the parts of a matrix in NF4 with double quantisation."""
    scales = -(-weight.numel() // BLOCK)
    nested = QuantState(torch.empty(-(-scales // SCALES)), code=torch.empty(256), blocksize=SCALES, dtype=torch.float32)
    state = QuantState(
        torch.empty(scales, dtype=torch.uint8), shape=weight.shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4",
        code=torch.empty(16), offset=torch.empty(()), state2=nested,
    )  # fmt: skip
    return torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8), state


def _packed(data: torch.Tensor, state: QuantState) -> nn.Parameter:
    weight: Any = nn.Parameter(data, requires_grad=False)
    weight.quant_state, weight.compress_statistics, weight.quant_type = state, True, "nf4"
    return weight  # type: ignore[no-any-return]


@contextmanager
def counted(model: Any, device: DeviceProfile, all_nonzero: bool) -> Iterator[LiveBytes]:
    """Give a model of the meta device fake tensors, and count what is made from then on; the count begins with what the model holds."""
    fakes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in fakes:
            fakes[id(tensor)] = tensor, torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return fakes[id(tensor)][1]

    on_host = device.torch_device == "cpu"
    live = LiveBytes(_host_block if on_host else _cuda_block, all_nonzero, MMAP_THRESHOLD_BYTES if on_host else 0)
    # Work makes small tensors of its own from numbers, which are real.
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        for module in model.modules():
            _replace(module, fake)
        yield live


def _replace(module: nn.Module, fake: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        state = getattr(parameter, "quant_state", None)
        if state is None:
            module._parameters[name] = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
            continue
        for part, key in ((state, "absmax"), (state, "code"), (state, "offset"), (state.state2, "absmax"), (state.state2, "code")):
            tensor = getattr(part, key)
            if tensor.is_meta:  # not yet done for a matrix that is tied to it
                setattr(part, key, fake(tensor))
        module._parameters[name] = _packed(fake(parameter), state)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = fake(buffer)
