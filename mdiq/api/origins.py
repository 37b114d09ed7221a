"""Which web pages may use an API from a browser."""

from collections.abc import Sequence

from aiohttp import web

from mdiq.api.hosts import Hosts
from mdiq.api.requests import ApiError


class Origins:
    """The origins whose pages may; "*": all. hosts: the names of this address, whose own pages may too."""

    def __init__(self, origins: Sequence[str], hosts: Hosts) -> None:
        self._origins, self.hosts = origins, hosts

    def allowed(self, request: web.Request) -> str | None:
        """Return the request's origin if its web pages may call the API."""
        origin = request.headers.get("Origin")
        return origin if {origin, "*"} & {*self._origins} else None

    def check(self, request: web.Request, *, has_key: bool) -> None:
        """Refuse web pages that may not use the API: a browser sends what they ask for all the same.

        A page of this very address may, unless its name is not one of ours: any page can have one that leads here.
        has_key: the request came with a key of the API.

        Raises:
            ApiError: they may not.
        """
        given = request.headers.get("Origin")
        if given is None or self.allowed(request) is not None:
            return
        if has_key:
            return  # no browser sends a key by itself
        place = given.partition("://")[2]
        if place != request.host or not self.hosts.allows(place):
            text = "web pages of this origin may not use this API; api.cors_origins names those that may"
            raise ApiError(403, text, code="origin_not_allowed")

    async def allow(self, request: web.Request, response: web.StreamResponse) -> None:
        """Tell a browser that a page may read the answer."""
        if origin := self.allowed(request):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Vary"] = "Origin"
            if request.method == "OPTIONS":
                asked = request.headers.get("Access-Control-Request-Headers", "Authorization, Content-Type")
                response.headers["Access-Control-Allow-Headers"] = asked
                response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
                response.headers["Access-Control-Max-Age"] = "600"
