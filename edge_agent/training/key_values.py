"""The keys and values of what a model has read, in memory that is taken once for all that will be read.

A cache that grows by concatenation copies all of itself for every token, and the blocks that it gives back are each a little too small for
the next: on a CPU they stay with the process as holes. A block for each layer would fill the holes that training has left, and what a layer
takes for a moment would lie between them; so all layers share one.

Shapes: B rows, K key heads, T tokens, C tokens that there is room for, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class Room:
    """The memory of the keys, or of the values, of all layers: one block, taken when the first of them asks."""

    def __init__(self, layers: int, rows: int, capacity: int) -> None:
        self._layers, self._rows, self._capacity = layers, rows, capacity
        self._free: list[torch.Tensor] | None = None

    def take(self, new: torch.Tensor) -> torch.Tensor:
        """Return B x K x C x E for a layer that adds B x K x T x E; of its own where it is not like the first layer."""
        shape = (self._rows, new.shape[1], self._capacity, new.shape[3])
        if self._free is None:
            block = new.new_empty(self._layers, *shape)
            self._free = [block[layer] for layer in range(self._layers)]
        return self._free.pop() if self._free and self._free[-1].shape == shape else new.new_empty(shape)


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """The keys and values of one layer in rooms for some rows and tokens; a single row that is added is added to all."""

    def __init__(self, rooms: tuple[Room, Room]) -> None:
        super().__init__()
        self._rooms = rooms

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take the memory, for keys and values of these shapes and types."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._taken = [room.take(new) for room, new in zip(self._rooms, (key_states, value_states), strict=True)]
        self.keys, self.values = (taken_BKCE[:, :, :0] for taken_BKCE in self._taken)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values, B x K x T x E or 1 x K x T x E; return those of the rows that were added, with all before them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.get_seq_length()
        total = seen + key_states.shape[-2]
        for taken_BKCE, new in zip(self._taken, (key_states, value_states), strict=True):
            taken_BKCE[:, :, seen:total] = new
        self.keys, self.values = (taken_BKCE[:, :, :total] for taken_BKCE in self._taken)
        return self.keys[: len(key_states)], self.values[: len(value_states)]


def reserve(model: Any, rows: int, capacity: int) -> DynamicCache:
    """Return an empty cache for a model. Layers that keep a window, or no keys and values, are those of transformers."""
    cache = DynamicCache(config=model.config.get_text_config())
    reserved = sum(type(layer) is DynamicLayer for layer in cache.layers)
    rooms = Room(reserved, rows, capacity), Room(reserved, rows, capacity)
    cache.layers = [ReservedLayer(rooms) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def read_beginning(model: Any, cache: DynamicCache, ids: list[int], rows: int) -> None:
    """Compute the tokens that all rows of an empty cache begin with, once."""
    model.get_decoder()(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        if not isinstance(layer, ReservedLayer):
            layer.batch_repeat_interleave(rows)
