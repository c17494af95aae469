"""Scores and weights of a job's samples on disk, so that a run that goes on does not take them again."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from edge_agent.files import write_file
from edge_agent.training.methods.method import Scores, Weights

FILE = "scores.safetensors"
Scored = tuple[list[Scores], list[Weights]]


def save_scores(directory: Path, key: str, scored: Scored) -> None:
    """Write scores, without hidden states, and weights, whole or not at all. Raises OSError."""
    tensors: dict[str, torch.Tensor] = {}
    for i, (scores, weights) in enumerate(zip(*scored, strict=True)):
        for name, tensor_T in (vars(scores) | vars(weights)).items():
            if tensor_T is not None and name != "hidden_TD":
                tensors[f"{i}/{name}"] = tensor_T.contiguous()
    write_file(directory / FILE, save(tensors, metadata={"key": key}))


def load_scores(directory: Path, key: str, samples: int) -> Scored | None:
    """Return what was written under the same key (of job, model and samples) for so many samples; None where there is no such file."""
    try:
        with safe_open(directory / FILE, framework="pt", backend="pread") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return None
    names = [field.name for field in fields(Scores)]
    scores = [Scores(*(kept.get(f"{i}/{name}") for name in names)) for i in range(samples)]  # type: ignore[arg-type]
    weights = [Weights(kept[f"{i}/likelihood_T"], kept[f"{i}/unlikelihood_T"]) for i in range(samples)]
    return scores, weights
