"""Commands of the models on a node: `models add | list | remove | verify`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from edge_agent.cli.fleet import AgentConfigOption
from edge_agent.cli.shared import JsonOption, explained, print_json
from edge_agent.config import AGENT_CONFIG, AgentConfig, read_config
from edge_agent.console import printable
from edge_agent.errors import ModelMissing, human_bytes
from edge_agent.models import ModelView, installed, list_models
from edge_agent.models import remove as remove_model
from edge_agent.models import verify as verify_model

NameArgument = Annotated[str, typer.Argument(help="The model's name, as jobs know it.")]


def add(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A directory, a URL (https://…), or the id of a model at the hub.")],
    name: Annotated[
        str | None, typer.Option("--name", help="How jobs know it; default: the last part of SOURCE, in small letters.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="At the hub a branch, tag or commit; of a URL the sha256 of its SHA256SUMS.")
    ] = None,
    quantise: Annotated[
        bool, typer.Option("--quantise/--no-quantise", help="Load it in 4 bits once, so that no job has to; this also shows that it loads.")
    ] = True,
    config: AgentConfigOption = AGENT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Bring a model to this node, whole or not at all, and have jobs use it. An agent that runs tells of it at once."""
    with explained(as_json):
        from edge_agent.model_adding import add as add_model

        read = read_config(config, AgentConfig)
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True, disable=as_json or not console.is_terminal) as progress:
            _quiet_hub()
            added = add_model(read, source, name, revision, quantise, partial(_begin, progress))
        if as_json:
            print_json(added)
            return
        revised = f" at {added.source.revision}" if added.source.revision else ""
        typer.echo(f"{added.name}  {printable(added.source.location)}{revised}, {human_bytes(added.size_bytes)}, in {added.path}")
        if added.note:
            typer.echo(f"not quantised: {printable(added.note)}" if not added.was_there else added.note)


def _begin(progress: Progress, step: str, size_bytes: int) -> Callable[[int], None]:
    return partial(progress.advance, progress.add_task(step, total=size_bytes or None))


def _quiet_hub() -> None:
    """The hub's client has bars of its own, one a file."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()


def list_(config: AgentConfigOption = AGENT_CONFIG, as_json: JsonOption = False) -> None:
    """List the models of this node: those that were added, and those that its configuration names."""
    with explained(as_json):
        found = list_models(read_config(config, AgentConfig))
        if as_json:
            print_json(found)
        else:
            Console().print(_table(found) if found else "no models; `edge-agent models add SOURCE` brings one")


def _table(models: list[ModelView]) -> Table:
    names = ("architecture", "parameters", "size", "in 4 bits", "source", "offered")
    table = Table(Column("model", no_wrap=True), *(Column(name, overflow="fold") for name in names), box=None, padding=(0, 1))
    for m in models:
        revision = f" at {m.source.revision[:12]}" if m.source and m.source.revision else ""
        table.add_row(
            m.name, Text(printable(m.architecture or "-")), "-" if m.parameters is None else f"{m.parameters / 1e6:,.1f} M",
            human_bytes(m.size_bytes), human_bytes(m.quantised_bytes) if m.quantised_bytes else "no",
            Text(printable(f"{m.source.location}{revision}" if m.source else f"[models]: {m.path}")),
            Text("yes" if m.offered else printable(f"no: {m.problem}"), style="" if m.offered else "red"),
        )  # fmt: skip
    return table


def remove(name: NameArgument, config: AgentConfigOption = AGENT_CONFIG, as_json: JsonOption = False) -> None:
    """Delete a model that was added, and its entries in the cache, unless a job that has not ended needs it."""
    with explained(as_json):
        freed = remove_model(read_config(config, AgentConfig), name)
        if as_json:
            print_json({"name": name, "freed_bytes": freed})
        else:
            typer.echo(f"{name}  removed, {human_bytes(freed)} are free again")


def verify(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Models that were added; default: all.")] = None,
    config: AgentConfigOption = AGENT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Read every file of models that were added, and hold it against the sha256 of then; exit code 5 where one is another."""
    with explained(as_json):
        read = read_config(config, AgentConfig)
        found = [verify_model(read, name) for name in names or installed(read)]
        if as_json:
            print_json(found)
        for model in found if not as_json else ():
            typer.echo(
                f"{model.name}  {'differs' if model.problems else 'as it was added'}, {model.files} files, {human_bytes(model.size_bytes)}"
            )
            for problem in model.problems:
                typer.echo(f"  {printable(problem)}")
        if any(model.problems for model in found):
            sys.stdout.flush()
            raise typer.Exit(ModelMissing.exit_code)
