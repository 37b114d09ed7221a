"""What the Starter says to its peers on the control plane."""

import structlog

from mdiq.core import control
from mdiq.errors import TransportError
from mdiq.transport.base import ControlServer

log = structlog.get_logger()

MAX_UNREACHED = 256


class Sender:
    """Sends messages, each tagged with the key; that a peer cannot be reached is logged once, until it can be again."""

    def __init__(self, server: ControlServer, key: bytes) -> None:
        self._server = server
        self._key = key
        self._ping = control.encode(control.Ping(), key)
        self._unreached: set[bytes] = set()

    async def send(self, identity: bytes, message: control.Message) -> bool:
        """Send a message; return whether there is a connection for it."""
        error = await self._not_sent(identity, control.encode(message, self._key))
        if not error:
            self._unreached.discard(identity)
        elif identity not in self._unreached:
            if len(self._unreached) >= MAX_UNREACHED:  # each connection has an identity of its own
                self._unreached.clear()
            self._unreached.add(identity)
            log.info("control_message_not_sent", peer=repr(identity), message=type(message).__name__, error=error)
        return not error

    async def reaches(self, identity: bytes) -> bool:
        """Return whether a peer has a connection."""
        return not await self._not_sent(identity, self._ping)

    async def _not_sent(self, identity: bytes, data: bytes) -> str:
        """Send something; return why that cannot be, or an empty text."""
        try:
            await self._server.send(identity, data)
        except TransportError as error:
            return str(error)
        return ""
