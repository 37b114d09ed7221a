"""By which names an API without keys is asked: against web pages whose own name was made to lead here."""

import ipaddress
import re
import socket
from collections.abc import Sequence

from aiohttp import web

from mdiq.api.requests import ApiError

MAX_SHOWN = 100
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(:[0-9]+)?")
_OF_LOCAL_NETWORKS = ("local", "lan", "internal", "home.arpa")  # RFC 6762, RFC 8375, and what home routers write


class Hosts:
    """The names in the Host header that lead here by the operator's will.

    They are addresses, names without a dot, those under localhost, this machine's own name, and the ``allowed`` ones.
    Nobody else can have such a name. A page of another name may have been made to look like one of this address (DNS
    rebinding): its browser would let it read every answer.
    """

    def __init__(self, allowed: Sequence[str] = ()) -> None:
        own = socket.gethostname().lower()
        first = own.partition(".")[0]
        self._names = {own, *(f"{first}.{end}" for end in _OF_LOCAL_NETWORKS), *(name.lower() for name in allowed)}

    def allows(self, host: str) -> bool:
        """Return whether the value of a Host header has such a name. The port does not matter."""
        if (found := _HOST.fullmatch(host)) is None:
            return False
        name = found[1].lower().removesuffix(".")
        if not name:
            return False
        if ("." not in name and name[0] != "[") or name.endswith(".localhost") or name in self._names:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    def check(self, request: web.Request) -> None:
        """Refuse a request to another name. Without a Host header it comes from no browser.

        Raises:
            ApiError: it has another name.
        """
        host = request.headers.get("Host")
        if host and not self.allows(host):
            text = (
                f"this API has no keys and is not known as {host[:MAX_SHOWN]!r}; name it in api.allowed_hosts, "
                "or have clients send keys (api.keys_file)"
            )
            raise ApiError(403, text, code="host_not_allowed")
