"""Sessions that check redirects before they follow them: a data server must not lead into this network."""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from types import SimpleNamespace
from typing import Any
from urllib.request import getproxies

import aiohttp
from yarl import URL

from softmask_fast.data.types import FinalError
from softmask_fast.errors import printable, without_secrets

logger = logging.getLogger(__name__)

_REMEMBERED = 10.0  # seconds for which a host keeps its addresses
_logged: set[tuple[str | None, str | None]] = set()  # pairs of hosts


class RefusedRedirect(FinalError):
    """A redirect that is not followed; the message says why."""


async def open_session(**options: Any) -> aiohttp.ClientSession:
    """An aiohttp session, in fsspec's event loop, that checks redirects.

    The first redirect to another public host is logged. Hosts that the user's own URLs name are not restricted.

    Raises:
        RefusedRedirect: Raised by requests that are redirected to a private or local address, or from https to http.
    """
    resolver, trace = _Resolver(), aiohttp.TraceConfig()

    async def check(
        session: aiohttp.ClientSession, context: SimpleNamespace, params: aiohttp.TraceRequestRedirectParams
    ) -> None:
        location = params.response.headers.get("Location") or params.response.headers.get("URI") or ""
        try:
            await _check(params.url, params.url.join(URL(location)), resolver)
        except BaseException:
            params.response.close()
            raise

    trace.on_request_redirect.append(check)
    connector = aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False)
    return aiohttp.ClientSession(connector=connector, trace_configs=[trace], **options)


async def _check(here: URL, there: URL, resolver: _Resolver) -> None:
    if there.scheme not in ("http", "https") or there.host is None or here.origin() == there.origin():
        return  # aiohttp itself refuses other schemes
    source, target = (printable(without_secrets(str(url))) for url in (here, there))
    if here.scheme == "https" and there.scheme == "http":
        raise RefusedRedirect(f"{source} redirects from https to http: {target}")
    try:
        addresses = [entry["host"] for entry in await resolver.look_up(there.host, there.port)]
    except OSError:
        if not getproxies():
            raise
        addresses = []  # the proxy resolves the name
    if private := [address for address in addresses if not is_public(address)]:
        raise RefusedRedirect(f"{source} redirects to {target}, a private or local address ({private[0]})")
    if here.host != there.host and (here.host, there.host) not in _logged:
        _logged.add((here.host, there.host))
        logger.warning("%s redirects to another host: %s", source, target)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet, not to this machine or a private network."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    return ip.is_global and not ip.is_multicast


class _Resolver(aiohttp.ThreadedResolver):
    """Remembers addresses, so that a connection goes to the address that was checked."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[tuple[str, int, int], tuple[float, list[Any]]] = {}

    async def look_up(self, host: str, port: int) -> list[Any]:
        """The addresses of a host, looked up now."""
        found = await super().resolve(host, port, socket.AF_UNSPEC)
        self._found[host, port, socket.AF_UNSPEC] = time.monotonic(), found
        return found

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_UNSPEC) -> list[Any]:
        since, found = self._found.get((host, port, family), (-_REMEMBERED, []))
        if time.monotonic() - since < _REMEMBERED:
            return found
        found = await super().resolve(host, port, family)
        self._found[host, port, family] = time.monotonic(), found
        return found
