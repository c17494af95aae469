"""Commands of the tokens by which a coordinator knows who asks: `tokens new | list | revoke`, and `audit`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from edge_agent.cli.fleet import CoordinatorConfigOption, UrlOption, client_of
from edge_agent.cli.shared import JsonOption, explained, print_json
from edge_agent.config import COORDINATOR_CONFIG
from edge_agent.console import audit_table, tokens_table
from edge_agent.mqtt import DAY_S

NameArgument = Annotated[str, typer.Argument(help="Of small letters, digits and hyphens: whose it is, or what it is for.")]


def new(
    name: NameArgument,
    scope: Annotated[str, typer.Option("--scope", help="read, submit (also hands in and cancels jobs), or admin (everything).")],
    days: Annotated[float | None, typer.Option("--days", min=0.001, max=3650, help="Until it expires; default: never.")] = None,
    config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Make a token for `Authorization: Bearer` and print it, once: the coordinator keeps its digest alone."""
    with explained(as_json), client_of(config, url) as client:
        if scope not in ("read", "submit", "admin"):
            raise typer.BadParameter(f"there is no scope {scope!r}; choose of read, submit, admin")
        made = client.new_token(name, scope, None if days is None else days * DAY_S)
        if as_json:
            print_json(made)
        else:
            typer.echo(made.secret)


def list_(config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False) -> None:
    """List the tokens, without their secrets."""
    with explained(as_json), client_of(config, url) as client:
        found = client.tokens()
        if as_json:
            print_json(found)
        else:
            Console().print(tokens_table(found))


def revoke(
    name: NameArgument, config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False
) -> None:
    """End a token: the next request with it is refused."""
    with explained(as_json), client_of(config, url) as client:
        view = client.revoke_token(name)
        if as_json:
            print_json(view)
        else:
            typer.echo(f"{view.name}  revoked")


def audit(
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="Show at most this many, the newest first.")] = 30,
    config: CoordinatorConfigOption = COORDINATOR_CONFIG, url: UrlOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """List what was asked of the coordinator that was to change something: who, when, what, and how it was answered."""
    with explained(as_json), client_of(config, url) as client:
        found = client.audit(limit)
        if as_json:
            print_json(found)
        else:
            Console().print(audit_table(found))
