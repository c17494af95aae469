"""The two matrices of the vocabulary, embedding and output head, in less memory than their numbers in the compute type take.

- In the 16 bits of their file where the model computes in 32: numbers are widened when they are used, a slice of the head at a time.
- In NF4: rows of the embedding are dequantised when they are looked up, the head a slice at a time.
- In their file: rows of the embedding are read when they are looked up, and none stays. Of no use where the head needs the same matrix.

Shapes: B positions, V vocabulary, D hidden size, R rows of a slice.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from quantization.nf4 import SLICE, Kernel, dequantize_rows, row_slices
from quantization.stored import StoredTensor

EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings")
"""What architectures call their embedding."""


@dataclass(frozen=True)
class _Rows:
    """How looked-up rows are made of stored ones: in the compute type, and times a number where the architecture has one (Gemma)."""

    dtype: torch.dtype
    scale: float

    @classmethod
    def like(cls, embedding: nn.Embedding) -> _Rows:
        return cls(embedding.weight.dtype, float(getattr(embedding, "scalar_embed_scale", 1.0)))

    def made_of(self, stored: torch.Tensor) -> torch.Tensor:
        rows = stored.to(self.dtype)
        return rows if self.scale == 1 else rows * torch.tensor(self.scale, dtype=self.dtype, device=rows.device)


class NarrowEmbedding(nn.Embedding):
    """An embedding whose rows are widened when they are looked up."""

    def __init__(self, like: nn.Embedding, stored: torch.dtype) -> None:
        super().__init__(like.num_embeddings, like.embedding_dim, like.padding_idx, device="meta", dtype=stored)
        self.rows = _Rows.like(like)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of the ids in the compute type."""
        return self.rows.made_of(super().forward(ids))


class NarrowHead(nn.Linear):
    """An output head whose numbers are widened a slice at a time."""

    def __init__(self, like: nn.Linear, stored: torch.dtype) -> None:
        super().__init__(like.in_features, like.out_features, like.bias is not None, device="meta", dtype=like.weight.dtype)
        self.weight = nn.Parameter(self.weight.data.to(stored), requires_grad=False)

    def slices(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield slices of rows, R x D, each in the memory of the one before."""
        step = max(1, SLICE // self.in_features)
        wide_RD = self.weight.new_empty(min(step, self.out_features), self.in_features, dtype=dtype)
        for start in range(0, self.out_features, step):
            rows = slice(start, min(start + step, self.out_features))
            yield rows, wide_RD[: rows.stop - start].copy_(self.weight[rows])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits in the type of the hidden states."""
        return _logits(x, self)


class Nf4Embedding(nn.Module):
    """An embedding in NF4."""

    def __init__(self, like: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rows = like.num_embeddings, like.embedding_dim, _Rows.like(like)
        self.weight = Params4bit(torch.empty(like.weight.shape, device="meta"), quant_type="nf4")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of the ids in the compute type."""
        return self.rows.made_of(dequantize_rows(self.weight, ids, self.rows.dtype))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.quant_state is not None:
            destination.update({f"{prefix}weight.{n}": part for n, part in self.weight.quant_state.as_dict(packed=True).items()})


class Nf4Head(Linear4bit):  # type: ignore[misc]
    """An output head in NF4 that is dequantised a slice at a time."""

    kernel: Kernel = "torch"

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(
            like.in_features, like.out_features, like.bias is not None, like.weight.dtype, quant_type="nf4", device=torch.device("meta")
        )

    def slices(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield slices of rows, R x D."""
        return row_slices(self.weight, dtype, self.kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits in the type of the hidden states."""
        return _logits(x, self)


def _logits(x: torch.Tensor, head: NarrowHead | Nf4Head) -> torch.Tensor:
    logits_BV: torch.Tensor = _SlicedProduct.apply(x.flatten(0, -2), head)  # type: ignore[no-untyped-call]
    # No view where none is needed: once its numbers are replaced, a view makes autograd copy the whole gradient (training/head.py).
    logits = logits_BV if x.dim() == 2 else logits_BV.view(*x.shape[:-1], head.out_features)
    # Where transformers ties the head to an embedding in NF4, it pads the bias to the number of bytes.
    return logits if head.bias is None else logits + head.bias[: head.out_features].to(x.dtype)


class _SlicedProduct(torch.autograd.Function):
    """The product with a frozen matrix that no whole copy is made of, and its gradient for the input."""

    @staticmethod
    def forward(ctx: Any, input_BD: torch.Tensor, head: NarrowHead | Nf4Head) -> torch.Tensor:
        ctx.head = head
        logits_BV = input_BD.new_empty(len(input_BD), head.out_features)
        for rows, part_RD in head.slices(input_BD.dtype):
            torch.mm(input_BD, part_RD.T, out=logits_BV[:, rows])
        return logits_BV

    @staticmethod
    def backward(ctx: Any, grad_BV: torch.Tensor) -> tuple[torch.Tensor, None]:
        # In 16 bits a thousand slices would be rounded a thousand times.
        grad_BD = grad_BV.new_zeros(len(grad_BV), ctx.head.in_features, dtype=torch.float32)
        for rows, part_RD in ctx.head.slices(grad_BV.dtype):
            grad_BD += grad_BV[:, rows] @ part_RD
        return grad_BD.to(grad_BV.dtype), None


class FileEmbedding(nn.Module):
    """An embedding that stays in its safetensors file; the system's file cache holds what is looked up often."""

    def __init__(self, like: nn.Embedding, file: str, start: int, stored: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rows = like.num_embeddings, like.embedding_dim, _Rows.like(like)
        self._stored, self._start = stored, start
        self._file = os.open(file, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of the ids in the compute type, on their device."""
        wanted, places = ids.unique(return_inverse=True)
        row_bytes = self.embedding_dim * self._stored.itemsize
        rows = bytearray().join(os.pread(self._file, row_bytes, self._start + row * row_bytes) for row in wanted.tolist())
        return self.rows.made_of(torch.frombuffer(rows, dtype=self._stored).view(-1, self.embedding_dim).to(ids.device))[places]


@dataclass(frozen=True)
class Vocabulary:
    """How a model is to hold its embedding and its output head."""

    stored: torch.dtype
    """The type of both in their file."""
    quantized: bool
    file: str | None = None
    """Where the embedding is to stay, from byte `start` on."""
    start: int = 0

    def place(self, model: Any) -> None:
        """Replace both in a model without weights. Layers of an architecture's own kind stay as they are.

        Raises ValueError for such an embedding that is to stay in its file: nothing would read it there.
        """
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        known = type(embedding) is nn.Embedding or hasattr(embedding, "scalar_embed_scale")
        kinds = known, type(head) is nn.Linear
        tied = bool(model.all_tied_weights_keys)
        if kinds[0] and (kinds[1] or not tied):
            model.set_input_embeddings(self._embedding(embedding))
        elif self.file is not None:
            raise ValueError(f"its embedding, a {type(embedding).__name__}, cannot stay in its file")
        if kinds[1] and (kinds[0] or not tied):
            model.set_output_embeddings(self._head(head))

    def _embedding(self, embedding: nn.Embedding) -> nn.Module:
        if self.file is not None:
            return FileEmbedding(embedding, self.file, self.start, self.stored)
        if self.quantized:
            return Nf4Embedding(embedding)
        return NarrowEmbedding(embedding, self.stored) if self._narrower(embedding) else embedding

    def _head(self, head: nn.Linear) -> nn.Module:
        if self.quantized:
            return Nf4Head(head)
        return NarrowHead(head, self.stored) if self._narrower(head) else head

    def _narrower(self, layer: nn.Embedding | nn.Linear) -> bool:
        return self.stored.itemsize < layer.weight.dtype.itemsize


def find_vocabulary(checkpoint: dict[str, StoredTensor], config: Any, quantized: bool, in_file: bool) -> Vocabulary | None:
    """Return how a model of a checkpoint holds its vocabulary, None for as transformers does; take from it what stays in its file.

    An embedding that is the head's matrix as well does not stay there: the head needs it whole.
    """
    matrices = {name: tensor for name, tensor in checkpoint.items() if tensor.shape[:1] == (config.vocab_size,) and len(tensor.shape) == 2}
    types = {tensor.float_type for tensor in matrices.values()}
    stored = types.pop() if len(types) == 1 else None
    if stored is None or any(tensor.shape[1] % 2 for tensor in matrices.values()):
        return None
    embeddings = [name for name in matrices if name.split(".")[-2] in EMBEDDINGS]
    if not in_file or config.tie_word_embeddings or len(embeddings) != 1:
        return Vocabulary(stored, quantized)
    left = checkpoint.pop(embeddings[0])
    return Vocabulary(stored, quantized, str(left.file), left.start())
