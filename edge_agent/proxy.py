"""The way out of a network that lets nothing out but through its proxy: HTTP CONNECT or SOCKS 5.

Neither looks up the name of a host on this machine: the proxy does.
Does not cover: proxies that are spoken to in TLS, and logins other than with a user name and a password (NTLM, Kerberos); a helper on this
machine can speak those. A proxy that drips an endless answer, a byte within every timeout, holds the connection up as long as it does.
"""

from __future__ import annotations

import socket
from base64 import b64encode
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

from edge_agent.config import Proxy


def open_tunnel(proxy: Proxy, host: str, port: int, timeout_s: float) -> socket.socket:
    """Return a socket that a proxy has connected to a host. Raises OSError, ValueError, or ConfigInvalid for its password."""
    where, login = urlsplit(proxy.url), proxy.login
    if where.scheme == "http":
        return _through_http(str(where.hostname), int(where.port or 0), login, host, port, timeout_s)
    from python_socks import ProxyError, ProxyType
    from python_socks.sync import Proxy as Socks

    username, password = login or (None, None)
    try:
        # With `rdns` it is the proxy that looks up the name.
        socks = Socks(ProxyType.SOCKS5, str(where.hostname), int(where.port or 0), username, password, rdns=True)
        return socks.connect(host, port, timeout_s)
    except ProxyError as error:
        raise OSError(str(error)) from None


def _through_http(
    proxy_host: str, proxy_port: int, login: tuple[str, str] | None, host: str, port: int, timeout_s: float
) -> socket.socket:  # fmt: skip
    """As above. The library of SOCKS could do this too, but takes the first piece of an answer for the whole."""
    connection = HTTPConnection(proxy_host, proxy_port, timeout=timeout_s)
    headers = {"Proxy-Authorization": f"Basic {b64encode(':'.join(login).encode()).decode()}"} if login else None
    connection.set_tunnel(host, port, headers)
    try:
        connection.connect()
    except HTTPException as error:
        connection.close()
        raise OSError(f"no answer in HTTP: {str(error)[:200]}") from None
    except BaseException:
        connection.close()
        raise
    opened: socket.socket = connection.sock
    return opened


def with_way(why: str, proxy: Proxy | None) -> str:
    """Return the reason of a failure with the proxy that may have caused it."""
    return why if proxy is None else f"{why}; the way is through the proxy {proxy.url}"
