"""Signatures: a DSSE envelope (github.com/secure-systems-lab/dsse, protocol 1.0.2) with Ed25519, and the keys that a node trusts.

Keys are in OpenSSH's formats: `edge-agent keys` and `ssh-keygen -t ed25519` make the same files, and the trusted ones are lines as in
`authorized_keys`.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from edge_agent.config import check_private
from edge_agent.errors import ConfigInvalid
from edge_agent.messages import PAYLOAD_TYPES, Addressed, Envelope, Signature

MAX_KEYS_FILE_BYTES = 64 * 1024


class SignatureInvalid(Exception):
    """An envelope is not signed by anyone who is trusted."""


@dataclass(frozen=True)
class PublicKey:
    """A key that may sign, with the comment of its line."""

    key: Ed25519PublicKey
    comment: str = ""

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` prints it."""
        digest = hashlib.sha256(base64.b64decode(self.key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1])).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    @property
    def line(self) -> str:
        """As it stands in a file of trusted keys."""
        return f"{self.key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()} {self.comment}".strip()


def seal(payload: Addressed, key: Ed25519PrivateKey | None) -> Envelope:
    """Put a payload into an envelope, signed if there is a key."""
    return seal_bytes(msgspec.json.encode(payload), type(payload), key)


def seal_bytes(payload: bytes, kind: type[Addressed], key: Ed25519PrivateKey | None) -> Envelope:
    """Likewise with what is said to be a payload of a kind."""
    envelope = Envelope(payload, PAYLOAD_TYPES[kind])
    if key is None:
        return envelope
    signature = Signature(key.sign(_signed(envelope)), PublicKey(key.public_key()).fingerprint)
    return msgspec.structs.replace(envelope, signatures=(signature,))


def verify(envelope: Envelope, trusted: Iterable[PublicKey]) -> PublicKey:
    """Return the trusted key that has signed the payload, which may be read only then. Raises SignatureInvalid."""
    if not envelope.signatures:
        raise SignatureInvalid("it is not signed; give the coordinator a `signing_key_file`")
    trusted = list(trusted)
    # Every key is tried: the name of a key in the envelope is a hint that nobody has signed.
    for signature in envelope.signatures:
        for known in trusted:
            try:
                known.key.verify(signature.sig, _signed(envelope))
            except InvalidSignature:
                continue
            return known
    named = ", ".join(s.keyid[:64] for s in envelope.signatures)
    raise SignatureInvalid(f"none of the {len(trusted)} keys that this node trusts has signed it; it names {named}")


def _signed(envelope: Envelope) -> bytes:
    """The bytes under a signature: DSSE's pre-authentication encoding of type and payload."""
    kind, payload = envelope.payload_type.encode(), envelope.payload
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def make_key(path: Path, comment: str) -> PublicKey:
    """Write a new private key that only its owner can read. Raises ConfigInvalid where the file is there, or cannot be written."""
    key = Ed25519PrivateKey.generate()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ConfigInvalid(path, "it is there already, and a key is never overwritten; choose another name") from None
    except OSError as error:
        raise ConfigInvalid(path, f"{error.strerror}; choose another place") from None
    return PublicKey(key.public_key(), comment)


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a key to sign with. Raises ConfigInvalid where it is missing, open to others, has a passphrase, or is of another kind."""
    check_private(path, "signing_key_file")
    try:
        key = load_ssh_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigInvalid(
            path, f"signing_key_file: it holds no private key without a passphrase ({error}); see `edge-agent keys`"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigInvalid(path, "signing_key_file: it is not an Ed25519 key; see `edge-agent keys new`")
    return key


def read_public(path: Path) -> list[PublicKey]:
    """Return the public keys of a private key or of a file of trusted keys. Raises ConfigInvalid."""
    try:
        private = b"PRIVATE KEY" in path.read_bytes()[:100]
    except OSError as error:
        raise ConfigInvalid(path, error.strerror or type(error).__name__) from None
    return [PublicKey(read_private_key(path).public_key())] if private else read_trusted(path)


def read_trusted(path: Path) -> list[PublicKey]:
    """Read the keys of a file, one a line; empty lines and comments (#) count for nothing. Raises ConfigInvalid."""
    try:
        state = path.stat()
        if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigInvalid(path, f"trust.keys_file: others can change it; run `chmod go-w {path}`")
        if state.st_size > MAX_KEYS_FILE_BYTES:
            raise ConfigInvalid(path, f"trust.keys_file: it has more than {MAX_KEYS_FILE_BYTES:,} bytes")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(path, f"trust.keys_file: {error}") from None
    return [_public_key(path, number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]


def _public_key(path: Path, number: int, line: str) -> PublicKey:
    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigInvalid(path, f"trust.keys_file: line {number} is no public key ({error}); it begins with ssh-ed25519") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigInvalid(path, f"trust.keys_file: line {number} is not an Ed25519 key; it begins with ssh-ed25519")
    return PublicKey(key, " ".join(line.split()[2:]))
