"""Certificates of a fleet: one authority, and what it has signed for brokers, coordinators and nodes (X.509, TLS 1.2 and 1.3).

The name of a node stands in its certificate, and a broker that takes it for the user's name and the client's id, as the samples in
`deploy/` do, lets nobody speak as another.
"""

from __future__ import annotations

import datetime
import ipaddress
import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_agent.config import NAME_PATTERN, check_private
from edge_agent.errors import ConfigInvalid, Refused
from edge_agent.files import write_file
from edge_agent.topics import COORDINATOR

log = logging.getLogger(__name__)

Kind = Literal["broker", "coordinator", "node"]
AUTHORITY_DAYS, CERTIFICATE_DAYS = 3650, 365
SOON_DAYS = 30
"""So long before a certificate expires it is told."""
HOST_PATTERN = r"^[A-Za-z0-9](?:[A-Za-z0-9.:-]{0,253}[A-Za-z0-9])?\Z"
LONGEST_NAME, LONGEST_INSTANCE = 64, 64 - len("coordinator.")
"""Of a subject in a certificate (RFC 5280); a broker's host may be longer, it stands elsewhere too."""
CLOCKS_DIFFER = datetime.timedelta(hours=1)
_PEM = serialization.Encoding.PEM
_USAGES = {
    "broker": ExtendedKeyUsageOID.SERVER_AUTH,
    "coordinator": ExtendedKeyUsageOID.CLIENT_AUTH,
    "node": ExtendedKeyUsageOID.CLIENT_AUTH,
}


@dataclass(frozen=True)
class Issued:
    """A certificate with its private key, as files."""

    certificate_file: Path
    key_file: Path
    fingerprint: str
    """SHA-256 of the certificate, as `openssl x509 -fingerprint -sha256` prints it."""
    expires: datetime.datetime


class Authority:
    """Signs the certificates of a fleet. Its directory holds `ca.pem`, which everyone may have, and `ca.key`, which nobody else may."""

    def __init__(self, directory: Path) -> None:
        """Open the authority of a directory, or make one. Raises ConfigInvalid."""
        self.certificate_file, key_file = directory / "ca.pem", directory / "ca.key"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not self.certificate_file.exists() and not key_file.exists():
                _make_authority(self.certificate_file, key_file)
            check_private(key_file, "the authority's key")
            self._certificate = x509.load_pem_x509_certificate(self.certificate_file.read_bytes())
            key = serialization.load_pem_private_key(key_file.read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigInvalid(directory, f"it holds no authority that can sign: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self._certificate.public_key():
            raise ConfigInvalid(key_file, "it is not the key of ca.pem")
        self._key = key

    def issue(self, kind: Kind, name: str, out: Path, days: int = CERTIFICATE_DAYS) -> Issued:
        """Write `NAME.pem`, `NAME.key` and the authority's `ca.pem` into a directory; files of those names are replaced.

        `name` is a node's id, `coordinator.INSTANCE`, or the broker's host. Raises ConfigInvalid where they cannot be written.
        """
        key, now = ec.generate_private_key(ec.SECP256R1()), _now()
        certificate = (
            _builder(name, key.public_key(), self._certificate.subject, now, days)
            .add_extension(x509.BasicConstraints(False, None), True)
            .add_extension(_key_usage(signs_certificates=False), True)
            .add_extension(x509.ExtendedKeyUsage([_USAGES[kind]]), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False)
        )
        if kind == "broker":
            certificate = certificate.add_extension(x509.SubjectAlternativeName([_host(name)]), False)
        signed = certificate.sign(self._key, hashes.SHA256())
        files = out / f"{name}.pem", out / f"{name}.key"
        try:
            out.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write_private(files[1], key)
            write_file(files[0], signed.public_bytes(_PEM))
            if not (out / "ca.pem").exists() or not (out / "ca.pem").samefile(self.certificate_file):
                write_file(out / "ca.pem", self._certificate.public_bytes(_PEM))
        except OSError as error:
            raise ConfigInvalid(out, f"{error.strerror}; give another --out") from None
        return Issued(*files, fingerprint(signed), signed.not_valid_after_utc)


def check_name(kind: Kind, name: str) -> None:
    """Raise Refused for what can be no name of that kind: it would become that of a file, and stand in rules of brokers."""
    pattern = HOST_PATTERN if kind == "broker" else NAME_PATTERN
    reserved = name == "ca" or (kind == "node" and name == COORDINATOR) or (kind == "coordinator" and len(name) > LONGEST_INSTANCE)
    if re.search(pattern, name) is None or reserved:
        raise Refused(f"{name[:80]!r} can be no {kind}'s name; it is like {pattern}, and not reserved or too long for a certificate")


def expiry(certificate_file: Path) -> datetime.datetime:
    """Return when a certificate expires. Raises ConfigInvalid where there is none in the file."""
    try:
        return x509.load_pem_x509_certificate(certificate_file.read_bytes()).not_valid_after_utc
    except (OSError, ValueError) as error:
        raise ConfigInvalid(certificate_file, f"it holds no certificate: {error}") from None


def days_left(certificate_file: Path) -> float:
    """Return the days until a certificate expires, negative afterwards. Raises ConfigInvalid."""
    return (expiry(certificate_file) - _now()).total_seconds() / 86400


def tell_expiry(certificate_file: Path) -> None:
    """Log an expiry that is near."""
    with suppress(ConfigInvalid):  # a missing one is told with the connection
        if (days := days_left(certificate_file)) < SOON_DAYS:
            log.warning("certificate_expires days=%d file=%s", days, certificate_file)


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 in pairs of hexadecimal digits."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def _make_authority(certificate_file: Path, key_file: Path) -> None:
    key, now = ec.generate_private_key(ec.SECP256R1()), _now()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edge-agent fleet authority")])
    certificate = (
        _builder("edge-agent fleet authority", key.public_key(), name, now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(True, 0), True)
        .add_extension(_key_usage(signs_certificates=True), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .sign(key, hashes.SHA256())
    )
    _write_private(key_file, key)
    write_file(certificate_file, certificate.public_bytes(_PEM))


def _builder(name: str, public: ec.EllipticCurvePublicKey, issuer: x509.Name, now: datetime.datetime, days: int) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:LONGEST_NAME])])
    return (
        x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
        .serial_number(x509.random_serial_number()).not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + datetime.timedelta(days=days))
    )  # fmt: skip


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=signs_certificates, crl_sign=signs_certificates, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _host(name: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Write a key that at no moment anybody else can read."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
