"""Commands that make certificates: `enroll broker | coordinator | node`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from edge_agent.cli.shared import JsonOption, explained, print_json

if TYPE_CHECKING:
    from edge_agent.enrolment import Kind

AuthorityOption = Annotated[Path, typer.Option("--authority", help="Directory of the fleet's authority; made where it is missing.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Where the files go; default: a directory of that name.")]
DaysOption = Annotated[int, typer.Option("--days", min=1, max=3650, help="Until the certificate expires.")]


class Enrolled(msgspec.Struct, frozen=True):
    """What was made, as these commands print it."""

    name: str
    certificate_file: Path
    key_file: Path
    fingerprint: str
    expires: datetime


def node(
    name: Annotated[str, typer.Argument(help="The node's name, as in its configuration.")],
    authority: AuthorityOption = Path("authority"), out: OutOption = None, days: DaysOption = 365, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Make the certificate of a node: a directory to bring to it, and the fingerprint to hold against it there."""
    _enroll("node", name, name, authority, out, days, as_json)


def coordinator(
    instance: Annotated[str, typer.Argument(help="The coordinator's `instance`.")] = "main",
    authority: AuthorityOption = Path("authority"), out: OutOption = None, days: DaysOption = 365, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Make the certificate of a coordinator, whose name is `coordinator.INSTANCE`."""
    _enroll("coordinator", instance, f"coordinator.{instance}", authority, out, days, as_json)


def broker(
    host: Annotated[str, typer.Argument(help="The server's host, as nodes and coordinators name it.")],
    authority: AuthorityOption = Path("authority"), out: OutOption = None, days: DaysOption = 365, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Make the certificate of the broker, or of the coordinator's HTTPS server."""
    _enroll("broker", host, host, authority, out, days, as_json)


def _enroll(kind: Kind, given: str, name: str, authority: Path, out: Path | None, days: int, as_json: bool) -> None:
    with explained(as_json):
        from edge_agent.enrolment import Authority, check_name

        check_name(kind, given)
        issued = Authority(authority).issue(kind, name, out or Path(name), days)
        if as_json:
            made = Enrolled(name, issued.certificate_file, issued.key_file, issued.fingerprint, issued.expires)
            print_json(msgspec.to_builtins(made, enc_hook=str))
            return
        typer.echo(f"{issued.certificate_file}\n{issued.key_file}\nexpires {issued.expires:%Y-%m-%d}\nSHA256 {issued.fingerprint}")
