"""The keys and values of what a model has read, in memory that is taken once for all that will be read.

A cache that grows by concatenation copies all of itself for every token, and the blocks that it gives back are each a little too small for
the next: on a CPU they stay with the process as holes.

Shapes: B rows, K key heads, T tokens, C tokens that there is room for, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """The keys and values of one layer with room for `capacity` tokens of `rows` rows; a single row that is added is added to all."""

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__()
        self._rows, self._capacity = rows, capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take the memory, for keys and values of these shapes and types."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._room = [new.new_empty(self._rows, new.shape[1], self._capacity, new.shape[3]) for new in (key_states, value_states)]
        self.keys, self.values = (room_BKCE[:, :, :0] for room_BKCE in self._room)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values, B x K x T x E or 1 x K x T x E; return those of the rows that were added, with all before them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.get_seq_length()
        total = seen + key_states.shape[-2]
        for room_BKCE, new in zip(self._room, (key_states, value_states), strict=True):
            room_BKCE[:, :, seen:total] = new
        self.keys, self.values = (room_BKCE[:, :, :total] for room_BKCE in self._room)
        return self.keys[: len(key_states)], self.values[: len(value_states)]


def reserve(model: Any, rows: int, capacity: int) -> DynamicCache:
    """Return an empty cache for a model. Layers that keep a window, or no keys and values, are those of transformers."""
    cache = DynamicCache(config=model.config.get_text_config())
    cache.layers = [ReservedLayer(rows, capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def read_beginning(model: Any, cache: DynamicCache, ids: list[int], rows: int) -> None:
    """Compute the tokens that all rows of an empty cache begin with, once."""
    model.get_decoder()(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        if not isinstance(layer, ReservedLayer):
            layer.batch_repeat_interleave(rows)
