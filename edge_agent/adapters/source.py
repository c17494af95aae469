"""Where adapters come from: a job's directory, one that was fetched, one of a merge, or PEFT's two files alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from safetensors import SafetensorError, safe_open

from edge_agent.adapters.report import MERGE_REPORT, Merge
from edge_agent.dataset import file_sha256
from edge_agent.errors import AdapterMismatch, ModelMissing
from edge_agent.job import Job
from edge_agent.report import Result
from quantization.model_files import ModelFiles, find_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""As PEFT names them."""
A, B = ".lora_A.weight", ".lora_B.weight"
PREFIX = "base_model.model."
T = TypeVar("T")
FREE = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "task_type",
})  # fmt: skip
"""Settings that change nothing of what an adapter is, where those are empty that would use them."""
NOT_PLAIN = "it is no plain LoRA of one rank, as jobs here make; nothing else is merged or handed on"


class LoraFile(msgspec.Struct, frozen=True):
    """What `adapter_config.json` says. PEFT reads the whole file, so any other setting must be empty, or one of `FREE`."""

    peft_type: Literal["LORA"]
    r: int
    lora_alpha: float
    use_rslora: bool = False
    bias: Literal["none"] = "none"
    target_modules: list[str] | None = None
    """A pattern instead of names would be matched in any time."""
    init_lora_weights: bool = True
    """Named ways to begin with would change the base model."""
    base_model_name_or_path: str | None = None

    @property
    def scaling(self) -> float:
        """Factor of B A."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


@dataclass(frozen=True)
class Source:
    """An adapter with what is known of it."""

    place: Path
    """As it was given."""
    name: str
    """Of it in reports."""
    adapter: Path
    """The directory of PEFT's two files."""
    sha256: str
    """Of its weights."""
    lora: LoraFile
    matrices: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """The shapes of A, R x I, and B, O x R, by the name of the module in the base model."""
    base: str | None
    """The name of its base model where it was trained."""
    fingerprint: str | None
    """Of the base model, where a report tells it."""
    job: Job | None
    """Where the directory has it."""
    result: Result | None

    @property
    def questions(self) -> int | None:
        """How many it was trained on, where a report tells it."""
        return self.result.data.questions if self.result and self.result.data else None

    @property
    def vocabulary(self) -> dict[str, bool]:
        """How the base model's vocabulary was held when it was trained."""
        return self.result.plan.vocabulary if self.result and self.result.plan else {}

    @property
    def ranks(self) -> set[int]:
        return {a_RI[0] for a_RI, _ in self.matrices.values()}


def find_source(place: Path, name: str | None = None) -> Source:
    """Return the adapter at a place. Raises AdapterMismatch where there is none, or one that is no plain LoRA."""
    root, adapter = _places(place)
    if not (adapter / CONFIG).is_file() or not (adapter / WEIGHTS).is_file():
        raise AdapterMismatch(place, f"there is no {CONFIG} with {WEIGHTS} in it; give a finished job, or its adapter/")
    lora, matrices = _lora(place, adapter / CONFIG), _matrices(place, adapter / WEIGHTS)
    if (ranks := sorted({a_RI[0] for a_RI, _ in matrices.values()})) != [lora.r]:
        raise AdapterMismatch(place, f"{NOT_PLAIN} (its matrices have the ranks {ranks}, {CONFIG} says {lora.r})")
    job, result = (_read(root / "job.json", Job), _read(root / "result.json", Result)) if root else (None, None)
    merge = _read(root / MERGE_REPORT, Merge) if root else None
    sha256 = file_sha256(adapter / WEIGHTS)
    told = merge.adapter if merge else result.adapter if result else None
    if told is not None and told.sha256 != sha256:
        raise AdapterMismatch(place, f"its weights have sha256 {sha256}, its report names {told.sha256}; fetch it again")
    model = merge.model if merge else result.model if result else None
    base = job.model if job else model.name if model else lora.base_model_name_or_path
    return Source(place, name or str(place), adapter, sha256, lora, matrices, base, model.fingerprint if model else None, job, result)


def base_model(source: Source, given: str | None) -> ModelFiles:
    """Return the base model of an adapter, or the one that is given for it.

    Raises AdapterMismatch where it is not here under its name, or is another one than the adapter was trained on.
    """
    name = given or source.base
    if name is None:
        raise AdapterMismatch(source.place, "it does not say what its base model is; give --model")
    try:
        files = find_model(name)
    except ModelMissing:
        if given is not None:
            raise
        raise AdapterMismatch(source.place, f"its base model {name!r} is not on this machine under that name; give --model") from None
    check_base(source, files)
    return files


def check_base(source: Source, files: ModelFiles) -> None:
    """Raise AdapterMismatch where an adapter was trained on another model, as far as its report or the shapes tell."""
    if source.fingerprint not in (None, files.fingerprint):
        told = f"its base model has the fingerprint {source.fingerprint}, {files.name!r} has {files.fingerprint}"
        raise AdapterMismatch(source.place, f"{told}; give the model that it was trained on with --model")
    shapes = {tensor.name: tensor.shape for tensor in files.tensors}
    for module, (a_RI, b_OR) in source.matrices.items():
        shape = shapes.get(f"{module}.weight")
        if shape is not None and shape != (b_OR[0], a_RI[1]):
            raise AdapterMismatch(source.place, f"its matrix {module} is {b_OR[0]} x {a_RI[1]}, that of {files.name!r} {shape}")


def _places(place: Path) -> tuple[Path | None, Path]:
    """Return the directory with the reports, None where there is none, and that of the adapter."""
    if not (place / CONFIG).is_file():
        return place, place / "adapter"
    parent = place.absolute().parent
    return (parent if place.absolute().name == "adapter" else None), place


def _read(file: Path, kind: type[T]) -> T | None:
    """Return a document, None where there is none, or one of another form."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _lora(place: Path, file: Path) -> LoraFile:
    """Return the settings of an adapter. Raises AdapterMismatch for any that jobs here do not make."""
    try:
        lora = msgspec.json.decode(file.read_bytes(), type=LoraFile)
        settings = msgspec.json.decode(file.read_bytes(), type=dict[str, object])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise AdapterMismatch(place, f"{NOT_PLAIN} ({CONFIG}: {str(error)[:200]})") from None
    if unknown := sorted(name for name in settings.keys() - FREE - set(LoraFile.__struct_fields__) if settings[name]):
        raise AdapterMismatch(place, f"{NOT_PLAIN} ({CONFIG} has {unknown[0][:80]!r})")
    return lora


def _matrices(place: Path, weights: Path) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the shapes of A and B of every module. Raises AdapterMismatch for a broken file, or one of anything else."""
    try:
        with safe_open(weights, framework="numpy") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterMismatch(place, f"its weights cannot be read ({str(error)[:200]})") from None
    modules = {name.removesuffix(A).removesuffix(B) for name in shapes}
    if not modules or {f"{m}{end}" for m in modules for end in (A, B)} != shapes.keys():
        raise AdapterMismatch(place, "its weights are not pairs of lora_A and lora_B")
    return {module.removeprefix(PREFIX): (shapes[module + A], shapes[module + B]) for module in sorted(modules)}
