"""Commands of the datasets that a coordinator has: `datasets list | remove`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from edge_agent.cli.fleet import CoordinatorConfigOption, UrlOption, client_of
from edge_agent.cli.shared import JsonOption, explained, print_json
from edge_agent.config import COORDINATOR_CONFIG
from edge_agent.console import datasets_table


def list_(
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="Show at most this many.")] = 100,
    config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """List the datasets that the coordinator has."""
    with explained(as_json), client_of(config, url) as client:
        found = client.datasets(limit)
        if as_json:
            print_json(found)
        else:
            Console().print(datasets_table(found))


def remove(
    sha256: Annotated[str, typer.Argument(help="Of the dataset.")],
    config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Delete a dataset that no job has; one of a job goes with `edge-agent forget`."""
    with explained(as_json), client_of(config, url) as client:
        view = client.remove_dataset(sha256)
        if as_json:
            print_json(view)
        else:
            typer.echo(f"{view.sha256}  removed")
