"""Peers of the control plane that have not joined: who may, and those that still serve an earlier Starter's Ring."""

from collections.abc import Callable

import structlog

from mdiq.errors import RemoteProtocolError

log = structlog.get_logger()

REPEAT_S = 5.0
MAX_STRANGERS = 256


class Strangers:
    """Says which strangers are to be told to end, so that they join this Ring; what else they say is of no use."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._told_s: dict[bytes, float] = {}

    def is_to_be_drained(self, identity: bytes) -> bool:
        """Return whether this one is to be told now: at once, and again while it goes on."""
        now, told_s = self._clock(), self._told_s.get(identity)
        if told_s is not None and now - told_s < REPEAT_S:
            return False
        if len(self._told_s) >= MAX_STRANGERS:
            self._told_s.clear()
        self._told_s[identity] = now
        log.info("stranger_drained", peer=repr(identity))
        return True


def check_hello(node: str, sender: str | None, holder: str, *, is_known: bool) -> None:
    """See that a peer may join as a Node. sender: whose key it has; holder: the Node that its connection is of.

    Raises:
        RemoteProtocolError: it may not.
    """
    if not is_known:
        raise RemoteProtocolError(f"Hello from {node!r}, which is not a node of this ring")
    if sender not in (None, node):
        raise RemoteProtocolError(f"Hello for {node!r} came with the key of {sender!r}")
    if holder != node:
        raise RemoteProtocolError(f"Hello for {node!r} from a peer that is {holder!r}")
