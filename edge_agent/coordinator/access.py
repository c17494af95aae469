"""Who may ask the coordinator for what: tokens with a scope, of which it keeps digests only."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from typing import get_args

import msgspec

from edge_agent.coordinator.store import CoordinatorStore
from edge_agent.coordinator.views import NewToken, Scope, Token
from edge_agent.errors import Forbidden, Refused, Unauthorized, Unknown

SCOPES: tuple[Scope, ...] = get_args(Scope)
ANYONE = "anyone"
"""Stands where a scope would: the web pages, before anybody has said who they are."""
SECRET_BYTES = 32
NOBODY = bytes(32)
"""Compared with where there is no token of a name: an answer takes as long."""


class Caller(msgspec.Struct, frozen=True):
    """Who asks."""

    name: str
    scope: Scope


LOCAL = Caller("local", "admin")
"""Who can open the socket in the state directory: the coordinator's own user."""


class Access:
    """The tokens of one coordinator. The coordinator's thread changes them; `caller` may be asked by any."""

    def __init__(self, store: CoordinatorStore) -> None:
        self._store = store
        self._digests = store.token_digests()

    def refresh(self) -> None:
        """Take in the tokens that other coordinators have made and revoked."""
        self._digests = self._store.token_digests()

    def new(self, name: str, scope: Scope, expires_s: float | None) -> NewToken:
        """Make a token. Raises Refused where somebody has that name."""
        self.refresh()
        if name in self._digests or name == LOCAL.name:
            raise Refused(f"there is a token {name!r} already; revoke it, or give another name")
        secret, now = secrets.token_urlsafe(SECRET_BYTES), time.time()
        token = Token(name=name, scope=scope, created=now, expires=None if expires_s is None else now + expires_s)
        self._store.add_token(token, _digest(secret))
        self._digests = self._store.token_digests()
        return NewToken(token=token, secret=f"{name}.{secret}")

    def revoke(self, name: str) -> Token:
        """End a token: the next request with it is refused. Raises Unknown."""
        self.refresh()
        if name not in self._digests:
            raise Unknown(f"there is no token {name!r}; `edge-agent tokens list` shows them")
        self._store.delete_token(name)
        token, _ = self._digests[name]
        self._digests = self._store.token_digests()
        return token

    def caller(self, authorization: str | None) -> Caller:
        """Return whose token a header holds. Raises Unauthorized where it holds none that is valid now."""
        scheme, _, text = (authorization or "").partition(" ")
        name, _, secret = text.strip().partition(".")
        token, digest = self._digests.get(name, (None, NOBODY))
        same = hmac.compare_digest(_digest(secret), digest)
        if scheme.lower() != "bearer" or token is None or not same or (token.expires is not None and time.time() >= token.expires):
            raise Unauthorized
        return Caller(token.name, token.scope)


Identify = Callable[[str | None], Caller]
"""Tells who asks from the header `Authorization`. Raises Unauthorized."""


def local(_: str | None) -> Caller:
    """Whoever asks on the socket."""
    return LOCAL


def allow(caller: Caller, needed: Scope) -> None:
    """Raise Forbidden where a caller may not do what takes a scope."""
    if SCOPES.index(caller.scope) < SCOPES.index(needed):
        raise Forbidden(caller.scope, needed)


def _digest(secret: str) -> bytes:
    """Of a secret of 256 random bits, which no list of likely ones holds: one round will do."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
