"""Peers of the control plane that have not joined: they still serve an earlier Starter's Ring."""

from collections.abc import Callable

import structlog

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
