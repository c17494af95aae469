"""The last decoder layer computes what somebody asks for: of the prompts' tokens, only what the answers' tokens attend to.

Its keys and values are those of all tokens, but nothing reads the rest that it makes of a prompt. So the matrices around its attention and
its MLP get only the positions of which the caller of the decoder wants the hidden states; at the others, those mean nothing.

Shapes: T tokens of a pack, A positions asked for, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from quantization.attention import Tree

BY_POSITION = ("q_proj", "o_proj", "dense", "mlp")
"""Parts of a layer that read every position by itself, as transformers names them."""


def ask_last_layer(decoder: Any) -> list[RemovableHandle]:
    """Let the last layer of a decoder heed `Tree.asked_A`; return the hooks that do it, in the place of those of an earlier call.

    Parts with other names compute all positions.
    """
    last = getattr(decoder, "layers", [None])[-1]
    if not hasattr(last, "self_attn"):
        return []
    for hook in getattr(last, "asked_hooks", ()):
        hook.remove()
    asked = _Asked()
    # Of the layer itself a checkpoint calls no hooks again in the backward pass; its attention comes first.
    last.asked_hooks = [last.self_attn.register_forward_pre_hook(asked.hear, with_kwargs=True)]
    for name, part in last.named_modules():
        *outer, own = name.split(".")
        if own in BY_POSITION and not set(outer) & set(BY_POSITION):
            last.asked_hooks += part.register_forward_pre_hook(asked.take), part.register_forward_hook(asked.put)
    return list(last.asked_hooks)


class _Asked:
    """The positions asked for in the pass that the layer is in, None for all."""

    def __init__(self) -> None:
        self._at_A: torch.Tensor | None = None
        self._tokens = 0

    def hear(self, _: torch.nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        """Note what the attention is called with."""
        tree: Tree | None = given.get("tree")
        self._at_A = None if tree is None else tree.asked_A
        self._tokens = 0 if tree is None else tree.branches[-1].stop

    def take(self, _: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Return the input at the positions asked for, 1 x A x D of 1 x T x D."""
        return (given[0].index_select(1, self._at_A), *given[1:]) if self._at_A is not None and self._is_whole(given[0]) else None

    def put(self, _: torch.nn.Module, __: tuple[Any, ...], made_1AD: torch.Tensor) -> torch.Tensor | None:
        """Return the output at its positions, and 0 at the others, 1 x T x D."""
        if self._at_A is None or self._is_whole(made_1AD):
            return None
        return made_1AD.new_zeros(1, self._tokens, made_1AD.shape[2]).index_copy_(1, self._at_A, made_1AD)

    def _is_whole(self, states: torch.Tensor) -> bool:
        """Whether they are of all tokens of the pass: positions of another pass must never be looked up."""
        return states.dim() == 3 and states.shape[1] == self._tokens
