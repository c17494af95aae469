"""One file holds all that training needs to go on: adapter, optimizer moments, token weights, and the update it stands at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from edge_agent.files import write_file
from edge_agent.training.methods.method import Weights

FILE = "checkpoint.safetensors"


class Progress(msgspec.Struct, frozen=True):
    """Where training stands. `key` names job, model and samples: a checkpoint of other ones is not used."""

    key: str
    updates: int = 0
    tokens: int = 0
    losses: tuple[float, ...] = ()


def trained(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def save_checkpoint(directory: Path, model: Any, optimizer: torch.optim.Optimizer, weights: list[Weights], progress: Progress) -> None:
    """Write the checkpoint, whole or not at all. Raises DiskFull."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in trained(model):
        tensors[f"adapter/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer/{name}/{key}"] = value
    tensors["weights/likelihood"] = torch.cat([w.likelihood_T for w in weights])
    tensors["weights/unlikelihood"] = torch.cat([w.unlikelihood_T for w in weights])
    on_host = {k: v.cpu().contiguous() for k, v in tensors.items()}
    write_file(directory / FILE, save(on_host, metadata={"progress": msgspec.json.encode(progress).decode()}))


def load_checkpoint(
    directory: Path, model: Any, optimizer: torch.optim.Optimizer, weights: list[Weights], key: str
) -> tuple[Progress, list[Weights]]:
    """Restore model and optimizer from the checkpoint of the same work; return where it stands and its token weights.

    Without one (or with one of other work, or a broken one) returns the start and the weights given.
    """
    path = directory / FILE
    try:
        with safe_open(path, framework="pt") as file:
            progress = msgspec.json.decode((file.metadata() or {}).get("progress", "{}"), type=Progress)
            if progress.key != key:
                return Progress(key), weights
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, msgspec.MsgspecError):
        return Progress(key), weights
    for name, parameter in trained(model):
        parameter.data.copy_(tensors[f"adapter/{name}"])
        prefix = f"optimizer/{name}/"
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        # The step counter stays on the host, as AdamW keeps it.
        optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
    lengths = [len(w.likelihood_T) for w in weights]
    pairs = zip(tensors["weights/likelihood"].split(lengths), tensors["weights/unlikelihood"].split(lengths), strict=True)
    return progress, [Weights(likelihood, unlikelihood) for likelihood, unlikelihood in pairs]
