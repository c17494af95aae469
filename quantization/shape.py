"""The sizes of a decoder, from the headers of its weight files, or from config.json alone where the family is known. Imports no torch.

Legend: D hidden size, F size of the MLP, Q and K total widths of query and key heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from edge_agent.errors import ModelUnsupported
from edge_agent.job import Lora
from quantization.model_files import ModelFiles, Tensor

EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "wpe", "embed_in", "embed_out", "word_embeddings")
MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "mlp")
SEPARATE = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
"""Families whose layers have q, k, v, o, gate, up and down."""
HEAD_SIZES = {"gemma": 256, "gemma2": 256, "gemma3_text": 256, "qwen3": 128}
"""Of families whose heads do not share the hidden size among them."""
TIED = ("gemma", "gemma2", "gemma3_text", "smollm3")
"""Families whose output head is the embedding unless the configuration says otherwise."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that a plan needs."""

    hidden: int
    mlp: int
    query: int
    key: int
    layers: int
    vocabulary: int
    linear: tuple[Tensor, ...]
    """Matrices that are held in NF4."""
    other_elements: int
    """Elements held in the compute type: embeddings, head, norms, biases."""
    largest_elements: int
    """Elements of the largest tensor."""
    stored_bytes: int
    """Bytes of all weights on disk."""

    @property
    def stored_element_bytes(self) -> int:
        """Bytes of one number on disk."""
        return round(self.stored_bytes / max(1, self.linear_elements + self.other_elements))

    @property
    def linear_elements(self) -> int:
        return sum(t.elements for t in self.linear)

    @property
    def largest_linear(self) -> int:
        """Elements of the largest matrix in NF4."""
        return max((t.elements for t in self.linear), default=0)

    @property
    def tied(self) -> bool:
        """Whether embedding and output head are one matrix."""
        return self.other_elements < 2 * self.vocabulary * self.hidden


def read_shape(files: ModelFiles) -> Shape:
    """Return the sizes of a model. Raises ModelUnsupported where neither its configuration nor its weight files say them."""
    config: dict[str, Any] = files.config.get("text_config") or files.config
    sizes = _Sizes(files.name, config)
    tensors = files.tensors or tuple(_declared(files.name, config, sizes))
    linear = tuple(t for t in tensors if len(t.shape) == 2 and not any(name in t.name for name in EMBEDDINGS))
    return Shape(
        hidden=sizes.hidden,
        mlp=sizes.mlp,
        query=sizes.query,
        key=sizes.key,
        layers=sizes.layers,
        vocabulary=sizes.vocabulary,
        linear=linear,
        other_elements=sum(t.elements for t in tensors) - sum(t.elements for t in linear),
        largest_elements=max((t.elements for t in tensors), default=0),
        stored_bytes=sum(t.stored_bytes for t in tensors),
    )


def adapter_matrices(shape: Shape, lora: Lora) -> Iterator[int]:
    """Yield the number of elements of each trained matrix."""
    for t in shape.linear:
        if lora.targets == "all" or any(name in t.name for name in MLP):
            yield from (lora.rank * side for side in t.shape)


def adapter_elements(shape: Shape, lora: Lora) -> int:
    """Return the number of trained parameters."""
    return sum(adapter_matrices(shape, lora))


class _Sizes:
    """What a configuration says, by the names that architectures have for it."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        def size(*names: str) -> int:
            found = next((config[n] for n in names if isinstance(config.get(n), int) and config[n] > 0), None)
            if found is None:
                raise ModelUnsupported(name, f"its config.json has no {names[0]}; only decoder language models can be fine-tuned")
            return int(found)

        self.hidden, heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
        head = config.get("head_dim") or HEAD_SIZES.get(config.get("model_type", ""), self.hidden // heads)
        says_mlp = any(config.get(n) for n in ("intermediate_size", "n_inner", "ffn_dim"))
        self.mlp = size("intermediate_size", "n_inner", "ffn_dim") if says_mlp else 4 * self.hidden
        self.query, self.key, self.head = heads * head, (config.get("num_key_value_heads") or heads) * head, head
        self.layers, self.vocabulary = size("num_hidden_layers", "n_layer"), size("vocab_size")


def _declared(name: str, config: dict[str, Any], sizes: _Sizes) -> Iterator[Tensor]:
    """Yield the weights of a known family, in the type that the configuration states."""
    family = config.get("model_type", "")
    matrices, norms = _layer(family, config, sizes)
    if not matrices:
        raise ModelUnsupported(name, f"it has no weight files, and the sizes of a {family!r} are not known without them")
    stored = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2

    def tensor(where: str, *shape: int) -> Tensor:
        return Tensor(where, shape, prod(shape) * stored)

    yield tensor("embed_tokens", sizes.vocabulary, sizes.hidden)
    if not config.get("tie_word_embeddings", family in TIED):
        yield tensor("lm_head", sizes.vocabulary, sizes.hidden)
    yield tensor("norm", (2 if family == "phi" else 1) * sizes.hidden)
    if family == "phi":
        yield tensor("lm_head.bias", sizes.vocabulary)
    for layer in range(sizes.layers):
        yield tensor(f"{layer}.norms", norms)
        for matrix, (rows, columns, biased) in matrices.items():
            yield tensor(f"{layer}.{matrix}", rows, columns)
            if biased:
                yield tensor(f"{layer}.{matrix}.bias", rows)


def _layer(family: str, config: dict[str, Any], sizes: _Sizes) -> tuple[dict[str, tuple[int, int, bool]], int]:
    """Return the matrices of a layer as (rows, columns, biased), none of an unknown family, and the elements of its norms."""
    hidden, mlp, query, key = sizes.hidden, sizes.mlp, sizes.query, sizes.key
    if family == "phi3":
        return {
            "qkv_proj": (query + 2 * key, hidden, False), "o_proj": (hidden, query, False),
            "gate_up_proj": (2 * mlp, hidden, False), "down_proj": (hidden, mlp, False),
        }, 2 * hidden  # fmt: skip
    if family == "phi":
        inner = {"q_proj": query, "k_proj": key, "v_proj": key}
        return {n: (rows, hidden, True) for n, rows in inner.items()} | {
            "dense": (hidden, query, True), "fc1": (mlp, hidden, True), "fc2": (hidden, mlp, True)
        }, 2 * hidden  # fmt: skip
    if family not in SEPARATE:
        return {}, 0
    attention, of_mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    biased = family == "qwen2" or attention
    matrices = {
        "q_proj": (query, hidden, biased), "k_proj": (key, hidden, biased), "v_proj": (key, hidden, biased),
        "o_proj": (hidden, query, attention and family != "qwen2"),
        "gate_proj": (mlp, hidden, of_mlp), "up_proj": (mlp, hidden, of_mlp), "down_proj": (hidden, mlp, of_mlp),
    }  # fmt: skip
    norms = (4 if family in ("gemma2", "gemma3_text") else 2) * hidden
    return matrices, norms + (2 * sizes.head if family in ("qwen3", "gemma3_text") else 0)
