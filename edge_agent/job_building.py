"""Builds documents from what a person gives on the command line: files, a few options, and for jobs `--set field=value` for the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from edge_agent.dataset import file_sha256
from edge_agent.errors import DatasetEmpty, JobSchema
from edge_agent.hints import explain
from edge_agent.job import Evaluation, Job, Judging, Sampling, Seed, Strict

S = TypeVar("S", bound=msgspec.Struct)


class BuildOptions(Strict, frozen=True, kw_only=True):
    """What determines a dataset that is built, beside its questions and the model. Fields are those of a job."""

    sampling: Sampling = Sampling()
    judging: Judging = Judging()
    evaluation: Evaluation = Evaluation()
    """Of it the verifier, the longest output, and the number of prompts generated at once."""
    prompts: Literal["worked", "plain"] = "worked"
    seed: Seed = 42
    device: Literal["auto", "cpu", "cuda"] = "auto"


def build_job(model: str, data: Path, evaluation: Path | None, fields: Mapping[str, Any], settings: Iterable[str]) -> Job:
    """Return the job over a model and files.

    `fields` maps dotted names of the job document to values (None: not given); `settings` are `name=value` texts of `--set`,
    whose values are JSON or plain words. Raises JobSchema naming the option, DatasetEmpty for a missing file.
    """
    for path in (data, evaluation):
        if path is not None and not path.is_file():
            raise DatasetEmpty(str(path), "does not exist, or is no file")
    digests = {"sha256": file_sha256(data), "evaluation_sha256": file_sha256(evaluation) if evaluation else None}
    document: dict[str, Any] = {"model": model, "dataset": digests}
    given = [(name, value) for name, value in fields.items() if value is not None]
    return _convert(document, [*given, *map(_setting, settings)], Job, "job")


def build_change(settings: Iterable[str]) -> dict[str, Any]:
    """Return the fields of `method` that `name=value` texts of `--set` give. Raises JobSchema where there are none, or others."""
    document: dict[str, Any] = {}
    for name, value in map(_setting, settings):
        _place(document, name, value)
    method = document.pop("method", None)
    if document or not isinstance(method, dict):
        raise JobSchema("--set", "only fields of `method` can change while a job runs, such as method.correct_threshold=0.9")
    return method


def build_options(judge: str | None, fields: Mapping[str, Any]) -> BuildOptions:
    """Return the options of `edge-agent dataset build`; `judge` is `critic`, `model` or `endpoint:ALIAS`. Raises JobSchema."""
    source, _, alias = (judge or "critic").partition(":")
    given = {"judging.source": source, "judging.endpoint": alias or None, **fields}
    return _convert({}, [(name, value) for name, value in given.items() if value is not None], BuildOptions, "options")


def _convert(document: dict[str, Any], given: Iterable[tuple[str, Any]], kind: type[S], what: str) -> S:
    for name, value in given:
        _place(document, name, value)
    try:
        return msgspec.convert(document, type=kind)
    except msgspec.ValidationError as error:
        raise JobSchema(what, explain(error, kind)) from None


def named_verifier(text: str | None) -> str | dict[str, str] | None:
    """Return the job field for a verifier given as a name or as `regex:PATTERN`."""
    return {"name": "regex", "pattern": text.removeprefix("regex:")} if text and text.startswith("regex:") else text


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not re.fullmatch(r"[a-z_0-9]+(\.[a-z_0-9]+)*", name):
        raise JobSchema("--set", f"{text!r} is not of the form field=value, such as schedule.updates=60")
    try:
        return name, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return name, value


def _place(document: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        document = document.setdefault(parent, {})
        if not isinstance(document, dict):
            raise JobSchema("--set", f"{parent!r} in {name!r} has no fields")
    document[last] = value
