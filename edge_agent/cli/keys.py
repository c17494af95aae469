"""Commands of the keys that sign orders: `keys new | show`."""

from __future__ import annotations

import getpass
import socket
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from edge_agent.cli.shared import JsonOption, explained, print_json


class KeyLine(msgspec.Struct, frozen=True):
    """A public key as these commands print it."""

    fingerprint: str
    line: str
    """Of a file of trusted keys."""


def new(
    file: Annotated[Path, typer.Argument(help="Where the private key goes; there must be nothing yet.")],
    comment: Annotated[str | None, typer.Option("--comment", help="Ends the public line; default: user@host.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make an Ed25519 key for `signing_key_file` of a coordinator, and print the line that its nodes trust."""
    with explained(as_json):
        from edge_agent.signing import make_key

        key = make_key(file, comment or f"{getpass.getuser()}@{socket.gethostname()}")
        _print([KeyLine(key.fingerprint, key.line)], as_json)


def show(
    file: Annotated[Path, typer.Argument(help="A private key, or a node's `trust.keys_file`.")],
    as_json: JsonOption = False,
) -> None:
    """Print the public lines of a key or of a file of trusted keys, with their fingerprints."""
    with explained(as_json):
        from edge_agent.signing import read_public

        _print([KeyLine(key.fingerprint, key.line) for key in read_public(file)], as_json)


def _print(keys: list[KeyLine], as_json: bool) -> None:
    if as_json:
        print_json(keys)
        return
    for key in keys:
        typer.echo(key.line)  # alone on standard output, so that `>> trusted_keys` takes it
        typer.echo(f"fingerprint {key.fingerprint}", err=True)
