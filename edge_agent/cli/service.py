"""The command that makes a daemon a service: `install-service`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from edge_agent.cli.shared import JsonOption, explained, print_json
from edge_agent.install import UNIT_DIRECTORY, Kind, check_user, install, remove

CoordinatorFlag = Annotated[bool, typer.Option("--coordinator", help="The coordinator, instead of the agent of a node.")]
FileOption = Annotated[
    Path | None, typer.Option("--config", help="Its configuration; default: agent.toml or coordinator.toml in /etc/edge-agent.")
]
UserOption = Annotated[str | None, typer.Option("--user", help="Whom it runs as; made if need be; default: a user of the service's name.")]
UnitsOption = Annotated[Path, typer.Option("--unit-dir", help="Where units are.")]


def install_service(
    coordinator: CoordinatorFlag = False, config: FileOption = None, user: UserOption = None, unit_dir: UnitsOption = UNIT_DIRECTORY,
    gone: Annotated[bool, typer.Option("--remove", help="Stop the service and remove its unit; configuration and state stay.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, print the unit, and change nothing.")] = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Make the agent of this node, or the coordinator, a service of systemd: its user, its directories, and a hardened unit.

    The configuration is read first, by the user whom the service will run as. To be run as root; nothing is started by it.
    """
    with explained(as_json):
        kind: Kind = "coordinator" if coordinator else "agent"
        if user is not None:
            check_user(user)
        done = remove(kind, unit_dir, dry_run) if gone else install(kind, config, user, unit_dir, dry_run)
        if as_json:
            print_json(msgspec.to_builtins(done, enc_hook=str))
            return
        if dry_run and not gone:
            typer.echo(done.text)
        for step in done.done:
            typer.echo(f"would have: {step}" if dry_run else step)
        typer.echo(f"next: {done.next}")
