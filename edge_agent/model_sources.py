"""Where models come from: a directory of this machine, an HTTPS server (edge_agent/model_mirror.py), or the Hugging Face hub.

A source lists what it has, and gives one file at a time. Only files of known names are ever asked for: weights in safetensors, and what
configuration and tokenizer need. No name from outside has a directory in it, and nothing that could be run is fetched.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_agent.errors import ModelMissing, ModelSource
from edge_agent.models import Source
from quantization.model_files import find_model

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TEXTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", INDEX,
)  # fmt: skip
"""Files of a model beside its weights."""
_WEIGHTS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
Advance = Callable[[int], None]
"""Told of bytes as they come."""


@dataclass(frozen=True)
class Listed:
    """A file that a source has, with its sha256 where the source says it."""

    name: str
    size_bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Listing:
    """What a source has of a model, by name."""

    source: Source
    files: dict[str, Listed]
    pickled: bool = False
    """Whether there are weights that would have to be unpickled."""


class ModelPlace(Protocol):
    """A source whose files are listed."""

    @property
    def listing(self) -> Listing: ...

    def fetch(self, file: Listed, directory: Path, advance: Advance) -> None:
        """Put a file into a directory, whole or not at all; what has come of it may go on next time. Raises ModelSource, OSError."""


def is_wanted(name: str) -> bool:
    """Whether a file of this name belongs to a model."""
    return name in TEXTS or _WEIGHTS.fullmatch(name) is not None


class Directory:
    """A model in a directory of this machine. Raises what such a model is refused for.

    With a source it is a snapshot in the hub's cache, whose files are links to blobs: those of weights are named by the hub's sha256.
    """

    def __init__(self, path: Path, source: Source | None = None) -> None:
        find_model(str(path))
        self._path = path
        found = sorted(file for file in path.iterdir() if file.is_file() and is_wanted(file.name))
        files = {file.name: Listed(file.name, file.stat().st_size, _blob_sha256(file) if source else None) for file in found}
        self.listing = Listing(source or Source("directory", str(path.resolve())), files)

    def fetch(self, file: Listed, directory: Path, advance: Advance) -> None:
        part = directory / f"{file.name}.part"
        shutil.copyfile(self._path / file.name, part)
        part.replace(directory / file.name)
        advance(file.size_bytes)


def _blob_sha256(file: Path) -> str | None:
    name = file.resolve().name
    return name if _SHA256.fullmatch(name) else None


class Hub:
    """A model at the Hugging Face hub, or at what `HF_ENDPOINT` names, by the hub's own client: it knows tokens, retries and ways there."""

    def __init__(self, model: str, revision: str | None) -> None:
        """Ask which commit a revision is, and what is in it. Raises ModelSource."""
        from huggingface_hub import HfApi

        self._api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="edge-agent")
        with _explained(model):
            info = self._api.model_info(model, revision=revision, files_metadata=True)
        if _COMMIT.fullmatch(str(info.sha)) is None:
            raise ModelSource(model, f"the commit that the hub has of it is {str(info.sha)[:80]!r}, which is none")
        files = {
            file.rfilename: Listed(file.rfilename, int(file.size or 0), file.lfs.sha256 if file.lfs else None)
            for file in info.siblings if is_wanted(file.rfilename)
        }  # fmt: skip
        pickled = any(file.rfilename.endswith(_PICKLES) for file in info.siblings)
        self._model, self._commit, self.listing = model, info.sha, Listing(Source("hub", model, info.sha), files, pickled)

    def fetch(self, file: Listed, directory: Path, advance: Advance) -> None:
        with _explained(self._model):
            self._api.hf_hub_download(self._model, file.name, revision=self._commit, local_dir=directory)
        advance(file.size_bytes)


@contextmanager
def _explained(model: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        said = " ".join(str(error).split())[:400] or type(error).__name__
        raise ModelSource(model, f"there is no directory of this name here, and the hub cannot give it: {said}") from None


def at_hub(model: str, revision: str | None) -> ModelPlace:
    """Return a model of the hub; in the hub's offline mode as the cache of this machine has it. Raises ModelSource, ModelMissing."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not constants.HF_HUB_OFFLINE:
        return Hub(model, revision)
    try:
        path = Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=[*TEXTS, "*.safetensors"]))
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set, and the local Hugging Face cache does not have all of it"
        raise ModelMissing(f"{model}{f' at {revision}' if revision else ''}", why) from None
    return Directory(path, Source("hub", model, path.name))  # the name of a snapshot is its commit


def is_hub_id(text: str) -> bool:
    """Whether a text could be the id of a model at the hub."""
    return _HUB_ID.fullmatch(text) is not None
