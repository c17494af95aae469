"""Signatures: what is signed is what is read, by a key that the node trusts, in files that OpenSSH reads and writes."""

from __future__ import annotations

import base64
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import TINY, Cli
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from lacking import lack
from orders import NODE, make_offer, make_order

from edge_agent.admission import Rejected, check_order, open_envelope
from edge_agent.config import AgentConfig, Size, Trust
from edge_agent.errors import ConfigInvalid, MessageInvalid
from edge_agent.job import Dataset, Job
from edge_agent.messages import PAYLOAD_TYPES, Cancel, Envelope, Forget, Order, Signature
from edge_agent.signing import (
    PublicKey,
    SignatureInvalid,
    make_key,
    read_private_key,
    read_public,
    read_trusted,
    seal,
    seal_bytes,
    verify,
)
from profiles.device import device_profile

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
PUBLIC = PublicKey(KEY.public_key())


def _config(tmp_path: Path, *keys: Ed25519PrivateKey, required: bool = True) -> AgentConfig:
    file = tmp_path / "trusted_keys"
    file.write_text("# who may give orders\n\n" + "".join(f"{PublicKey(key.public_key(), 'a key').line}\n" for key in keys))
    return AgentConfig(NODE, tmp_path, Size(2**30), {"tiny": TINY}, trust=Trust(file, required))


def _order(**changes: Any) -> Order:
    return make_order(Job(model="tiny", dataset=Dataset("0" * 64), budget_bytes=2**30), 9, **changes)


def _opened(config: AgentConfig, order: Order, key: Ed25519PrivateKey | None) -> Order:
    return open_envelope(make_offer(order, None, key).order, Order, config, id=order.id)


def test_signature_is_of_the_encoding_that_dsse_prescribes() -> None:
    """Under the signature stand, with their lengths, the type and the payload (protocol.md of DSSE), and nothing else."""
    payload = b'{"a": 1}'
    [signature] = seal_bytes(payload, Order, KEY).signatures
    kind = b"application/vnd.edge1.order+json"
    KEY.public_key().verify(signature.sig, b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
    text = msgspec.json.decode(msgspec.json.encode(seal_bytes(payload, Order, KEY)))
    assert set(text) == {"payload", "payloadType", "signatures"}
    assert base64.b64decode(text["payload"]) == payload
    assert set(text["signatures"][0]) == {"sig", "keyid"}


@given(st.binary(max_size=64), st.data())
def test_every_change_breaks_the_signature(payload: bytes, data: st.DataObject) -> None:
    """Of payload, type or signature."""
    envelope = seal_bytes(payload, Order, KEY)
    assert verify(envelope, [PublicKey(OTHER.public_key()), PUBLIC]) is PUBLIC
    changed = data.draw(st.binary(max_size=64).filter(lambda other: other != payload))
    broken = bytearray(envelope.signatures[0].sig)
    broken[data.draw(st.integers(0, 63))] ^= 1 << data.draw(st.integers(0, 7))
    for bad in (
        msgspec.structs.replace(envelope, payload=changed),
        msgspec.structs.replace(envelope, payload_type=PAYLOAD_TYPES[Cancel]),
        msgspec.structs.replace(envelope, signatures=(Signature(bytes(broken), PUBLIC.fingerprint),)),
        msgspec.structs.replace(envelope, signatures=(Signature(b"", PUBLIC.fingerprint),)),
        Envelope(payload, PAYLOAD_TYPES[Order]),
    ):
        with pytest.raises(SignatureInvalid):
            verify(bad, [PUBLIC])
    with pytest.raises(SignatureInvalid):
        verify(envelope, [PublicKey(OTHER.public_key())])


def test_one_of_several_signatures_is_enough() -> None:
    """While keys are changed an order may have two; the name of the key is a hint that is not believed."""
    ours, theirs = (seal_bytes(b"{}", Order, key) for key in (KEY, OTHER))
    both = msgspec.structs.replace(ours, signatures=(*theirs.signatures, *ours.signatures))
    assert verify(both, [PUBLIC]) is PUBLIC
    misnamed = msgspec.structs.replace(ours, signatures=(Signature(ours.signatures[0].sig, "SHA256:someone"),))
    assert verify(misnamed, [PUBLIC]) is PUBLIC


def test_keys_are_changed_while_the_agent_runs(tmp_path: Path) -> None:
    """First both are trusted, then the new one alone; the file is read with every order."""
    order = _order()
    assert _opened(_config(tmp_path, KEY), order, KEY) == order
    config = _config(tmp_path, KEY, OTHER)
    assert [_opened(config, order, key) for key in (KEY, OTHER)] == [order, order]
    _config(tmp_path, OTHER)
    assert _opened(config, order, OTHER) == order
    with pytest.raises(Rejected, match="none of the 1 keys"):
        _opened(config, order, KEY)
    _config(tmp_path)
    with pytest.raises(Rejected, match="none of the 0 keys"):
        _opened(config, order, OTHER)


def test_signature_is_required_unless_the_node_says_otherwise(tmp_path: Path) -> None:
    """An optional one must be right all the same; without a file of keys nobody looks."""
    order = _order()
    with pytest.raises(Rejected, match="not signed") as rejected:
        _opened(_config(tmp_path, KEY), order, None)
    assert rejected.value.reason == "signature"
    optional = _config(tmp_path, KEY, required=False)
    assert _opened(optional, order, None) == order
    with pytest.raises(Rejected):
        _opened(optional, order, OTHER)
    careless = msgspec.structs.replace(optional, trust=None)
    assert _opened(careless, order, OTHER) == order


@pytest.mark.parametrize("changes", [{"node": "node-2"}, {"fleet": "theirs"}], ids=str)
def test_order_for_somebody_else_is_rejected(changes: dict[str, Any], tmp_path: Path) -> None:
    """However well it is signed."""
    with pytest.raises(Rejected) as rejected:
        _opened(_config(tmp_path, KEY), _order(**changes), KEY)
    assert rejected.value.reason == "audience"


def test_order_for_another_job_is_rejected(tmp_path: Path) -> None:
    """A signed order stands under the id that it names, so it cannot be offered again as another job."""
    with pytest.raises(Rejected) as rejected:
        open_envelope(seal(_order(), KEY), Order, _config(tmp_path, KEY), id=_order().id)
    assert rejected.value.reason == "audience"


def test_order_is_valid_for_a_time_that_the_node_remembers(tmp_path: Path) -> None:
    """Longer than deleted jobs are remembered it may not be."""
    order = _order()
    order = msgspec.structs.replace(order, expires=order.issued + timedelta(days=31))
    with pytest.raises(Rejected) as rejected:
        check_order(order, _config(tmp_path, KEY), device_profile("cpu"), 0, False, order.issued)
    assert rejected.value.reason == "expired"


@pytest.mark.parametrize(("hours", "taken"), [(-2, False), (0, True), (0.9, True), (1.1, False)])
def test_order_is_judged_by_the_clock_of_the_coordinator(hours: float, taken: bool, tmp_path: Path) -> None:
    """Which has issued it, for an hour here: it must not have expired by it, nor have been issued before it was set back by hours."""
    order = msgspec.structs.replace(_order(), model_fingerprint="0" * 64)  # the last thing that is looked at
    with pytest.raises(Rejected) as rejected:
        check_order(order, _config(tmp_path, KEY), device_profile("cpu"), 0, False, order.issued + timedelta(hours=hours))
    assert rejected.value.reason == ("model_mismatch" if taken else "expired")


def test_signature_is_for_one_kind_of_payload(tmp_path: Path) -> None:
    """A cancel and a `forget` of a job are the same but for their type, which is signed."""
    config = _config(tmp_path, KEY)
    cancel = Cancel("default", NODE, _order().id)
    assert open_envelope(seal(cancel, KEY), Cancel, config) == cancel
    for envelope in (seal(cancel, KEY), msgspec.structs.replace(seal(cancel, KEY), payload_type=PAYLOAD_TYPES[Forget])):
        with pytest.raises(Rejected):
            open_envelope(envelope, Forget, config)


@pytest.mark.parametrize("payload", [b"", b"[]", b"\xff", b"{" * 50_000, b'{"id": "x"}'], ids=lambda p: repr(p[:12]))
def test_payload_that_is_no_order_is_refused(payload: bytes, tmp_path: Path) -> None:
    """Signed or not."""
    with pytest.raises(MessageInvalid):
        open_envelope(seal_bytes(payload, Order, KEY), Order, _config(tmp_path, KEY))


def test_what_is_not_signed_is_not_read(tmp_path: Path) -> None:
    """Nothing of a payload is parsed before its signature has been verified: garbage is a wrong signature."""
    with pytest.raises(Rejected) as rejected:
        open_envelope(seal_bytes(b"{" * 50_000, Order, OTHER), Order, _config(tmp_path, KEY))
    assert rejected.value.reason == "signature"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ssh-ed25519 AAAA", "line 1 is no public key"),
        ("\nrubbish", "line 2 is no public key"),
        ("# a\n" + ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode(),
         "line 2 is not an Ed25519 key"),
        ("#" * 70_000, "65,536 bytes"),
    ],
)  # fmt: skip
def test_file_of_keys_that_is_broken_is_named(text: str, says: str, tmp_path: Path) -> None:
    """With its line; a node with such a file takes no order, and rejects none either."""
    file = tmp_path / "trusted_keys"
    file.write_text(text)
    with pytest.raises(ConfigInvalid, match=says):
        read_trusted(file)


def test_commands_make_and_show_keys(cli: Cli, tmp_path: Path) -> None:
    """`new` prints the line for the nodes alone on standard output and overwrites nothing; `show` prints it again, of either file."""
    private = tmp_path / "signing.key"
    made = cli("keys", "new", private, "--comment", "operator")
    assert made.code == 0, made.err
    assert made.out.startswith("ssh-ed25519 ")
    assert made.out.endswith(" operator\n")
    assert private.stat().st_mode & 0o777 == 0o600
    before = private.read_bytes()
    again = cli("keys", "new", private)
    assert (again.code, private.read_bytes()) == (13, before)
    trusted = tmp_path / "trusted_keys"
    trusted.write_text(made.out)
    [key] = read_trusted(trusted)
    assert key.fingerprint in made.err
    shown = [cli("keys", "show", file, "--json") for file in (private, trusted)]
    assert [found["fingerprint"] for ran in shown for found in ran.json] == [key.fingerprint] * 2
    verify(seal_bytes(b"{}", Order, read_private_key(private)), [key])


def test_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """As every other secret."""
    make_key(tmp_path / "signing.key", "")
    (tmp_path / "signing.key").chmod(0o644)
    with pytest.raises(ConfigInvalid, match="others can read it"):
        read_private_key(tmp_path / "signing.key")


def test_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    """An elliptic curve of another name is no Ed25519."""
    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    (tmp_path / "signing.key").write_bytes(key)
    (tmp_path / "signing.key").chmod(0o600)
    with pytest.raises(ConfigInvalid, match="not an Ed25519 key"):
        read_private_key(tmp_path / "signing.key")


def test_keys_are_those_of_openssh(tmp_path: Path) -> None:
    """What ssh-keygen makes signs orders, and it tells the same fingerprint of what we make."""
    if shutil.which("ssh-keygen") is None:
        lack("OPENSSH ABSENT: ssh-keygen is not installed, so keys were not held against its own")
    theirs = tmp_path / "theirs"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(theirs)], check=True, timeout=30)
    verify(seal_bytes(b"{}", Order, read_private_key(theirs)), read_trusted(theirs.with_suffix(".pub")))
    ours = make_key(tmp_path / "ours", "operator")
    told = subprocess.run(["ssh-keygen", "-l", "-f", str(tmp_path / "ours")], capture_output=True, text=True, check=True, timeout=30).stdout
    assert told.split()[1] == ours.fingerprint
    assert [key.fingerprint for key in read_public(tmp_path / "ours")] == [ours.fingerprint]
