"""Encrypted connections: TLS 1.2 or newer, and certificates that were checked, on the side that opens one and on the one that serves."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from edge_agent.config import Tls, check_private
from edge_agent.errors import ConfigInvalid


def client_context(tls: Tls, field: str) -> ssl.SSLContext:
    """Return the context of a table of the configuration. Raises ConfigInvalid where a certificate or key cannot be read."""
    for name in ("ca_file", "certificate_file", "key_file"):
        file: Path | None = getattr(tls, name)
        if file is not None and not os.access(file, os.R_OK):
            raise ConfigInvalid(file, f"{field}.{name}: it is missing or cannot be read")
    if tls.key_file is not None:
        check_private(tls.key_file, f"{field}.key_file")
    try:
        context = ssl.create_default_context(cafile=tls.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigInvalid(tls.ca_file or Path(field), f"{field}.ca_file: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.certificate_file is not None:
        try:
            context.load_cert_chain(tls.certificate_file, tls.key_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigInvalid(tls.certificate_file, f"{field}.certificate_file and key_file: {error}") from None
    return context


def server_context(certificate_file: Path, key_file: Path, ca_file: Path | None, table: str) -> ssl.SSLContext:
    """Return the context of a server; with `ca_file` one whose clients have certificates of that authority.

    `table` is that of the configuration which names the files. Raises ConfigInvalid where one is not what it should be.
    """
    check_private(key_file, f"{table}.key_file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate_file, key_file)
        if ca_file is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(ca_file)
    except (OSError, ssl.SSLError) as error:
        names = "certificate_file, key_file and ca_file" if ca_file is not None else "certificate_file and key_file"
        raise ConfigInvalid(certificate_file, f"{table}.{names}: {error}") from None
    return context
