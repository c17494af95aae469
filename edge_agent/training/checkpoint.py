"""One file holds all that training needs to go on: adapter, optimizer moments, what the objective keeps, and the update it stands at."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from edge_agent.files import write_file
from edge_agent.report import Change
from edge_agent.training.optimizer import restore_state, saved_state

FILE = "checkpoint.safetensors"
Tensors = dict[str, torch.Tensor]
Parameters = dict[str, torch.nn.Parameter]


class Progress(msgspec.Struct, frozen=True):
    """Where training stands. `key` names job, model and samples: a checkpoint of other ones is not used."""

    key: str
    updates: int = 0
    losses: tuple[float, ...] = ()
    development: tuple[float, ...] = ()
    """Loss on the development records after each epoch that was measured."""
    kept: int = 0
    """The update whose adapter is to be kept; 0 for the last one."""
    changes: tuple[Change, ...] = ()
    """Options that training has gone on with; the last ones hold."""

    @property
    def change(self) -> int:
        """The number of the last ones; 0: they are the job's own."""
        return self.changes[-1].number if self.changes else 0

    @property
    def waited(self) -> int:
        """Epochs since the lowest development loss."""
        return len(self.development) - 1 - self.development.index(min(self.development)) if self.development else 0


def save_checkpoint(directory: Path, parameters: Parameters, optimizer: torch.optim.Optimizer, kept: Tensors, progress: Progress) -> None:
    """Write the checkpoint, whole or not at all; `kept` is what else must come back. Raises DiskFull."""
    tensors = {f"kept/{name}": tensor for name, tensor in kept.items()}
    for name, parameter in parameters.items():
        tensors[f"adapter/{name}"] = parameter.detach()
        for key, value in saved_state(optimizer, parameter).items():
            tensors[f"optimizer/{name}/{key}"] = value
    on_host = {k: v.cpu().contiguous() for k, v in tensors.items()}
    write_file(directory / FILE, save(on_host, metadata={"progress": msgspec.json.encode(progress).decode()}))


def load_checkpoint(directory: Path, parameters: Parameters, optimizer: torch.optim.Optimizer, key: str) -> tuple[Progress, Tensors]:
    """Restore parameters and optimizer from the checkpoint of the same work; return where it stands and what else was kept.

    Without one (or with one of other work, or a broken one) returns the start and nothing.
    """
    try:
        # Mapped pages would count against the budget of the process.
        with safe_open(directory / FILE, framework="pt", backend="pread") as file:
            progress = msgspec.json.decode((file.metadata() or {}).get("progress", "{}"), type=Progress)
            if progress.key != key:
                return Progress(key), {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, msgspec.MsgspecError):
        return Progress(key), {}
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"adapter/{name}"])
        if remembered := under(f"optimizer/{name}/", tensors):  # nothing where it has just been made to forget
            restore_state(optimizer, parameter, remembered)
    return progress, under("kept/", tensors)


def under(prefix: str, tensors: Tensors) -> Tensors:
    """Return the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
