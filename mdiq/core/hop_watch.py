"""Finds Hops that carry nothing though both their ends live. Pure; time is an argument.

The Starter sends a PROBE round every second, also when nothing is asked. PROBEs are numbered, and every Node passes
them on. Each Node reports which one it has, and a number that changes whenever bytes arrive over the Hop into it. A
Hop is dead when its sender has had newer PROBEs than its receiver for ``silence_s``, and nothing has arrived at the
receiver in that time: no PROBE, and not a byte.

So a slow Hop is not dead: a large message that takes minutes arrives byte by byte. Nor is a Hop after a dead one: its
sender has no newer PROBE. A Node that is not heard says nothing of its Hops; it is for control/node_watch.py.

What is to be done about a dead Hop depends on what it did before: HopTroubles remembers that.

    a Hop is dead      and before that                                   what is to be done
    for the first time -                                                 its sockets are made anew
    again              nothing has come through since, or only lately    others replace one of its ends
"""

from dataclasses import dataclass, field

from mdiq.core.types import Epoch

MIN_PROBES = 3
"""So many PROBEs have to be missing: a single one may be lost, or still be under way."""
FRESH_S = 2.5  # a report is news for so long; one comes every second
AGAIN_S = 60.0
"""A Hop that dies so soon after it carried again is not worth another try."""
BARRED_S = 60.0
"""How long a Node that the Ring has left out for a dead Hop is not taken in again."""

HopNames = tuple[str, str]
"""The sender of a Hop and its receiver."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What has come over the Hop into a Node in this Epoch. inflow: see transport.base.FrameSource."""

    probe: int
    inflow: int


@dataclass(slots=True)
class _Hop:
    arrivals: Arrivals | None = None
    heard_at: float = float("-inf")
    waits_since: float | None = None  # there is more to come, and nothing has arrived since


class HopWatch:
    """Watches the Hops of a Ring in one Epoch. Hop i leads from Node i to the next one; Node 0 is the Starter."""

    def __init__(self, num_hops: int, silence_s: float) -> None:
        self._silence_s = silence_s
        self._hops = [_Hop() for _ in range(num_hops)]
        self._num_sent = 0

    def sent(self, probe: int, now: float) -> None:
        """Note the newest PROBE that the Starter has sent."""
        self._num_sent = probe
        self._look_at(0, now)

    def heard(self, node: int, arrivals: Arrivals, now: float) -> None:
        """Take in the report of a Node."""
        i = (node - 1) % len(self._hops)
        hop = self._hops[i]
        if arrivals != hop.arrivals:
            hop.waits_since = None
        hop.arrivals, hop.heard_at = arrivals, now
        self._look_at(i, now)
        if node:
            self._look_at(node, now)

    def stretch(self, late_s: float) -> None:
        """Do not count time for which the watcher itself was stopped, and heard nothing."""
        for hop in self._hops:
            if hop.waits_since is not None:
                hop.waits_since += late_s

    def dead(self, now: float) -> int | None:
        """Return the first Hop that is dead, or None."""
        return next((i for i in range(len(self._hops)) if self._is_dead(i, now)), None)

    def probe(self, hop: int) -> int:
        """Return the newest PROBE that has come over a Hop; 0 before the first."""
        arrivals = self._hops[hop].arrivals
        return arrivals.probe if arrivals else 0

    def _is_dead(self, i: int, now: float) -> bool:
        hop = self._hops[i]
        if hop.waits_since is None or self._newest(i) - self.probe(i) < MIN_PROBES:
            return False
        heard_at = hop.heard_at if i == 0 else min(hop.heard_at, self._hops[i - 1].heard_at)
        return hop.heard_at - hop.waits_since >= self._silence_s and now - heard_at <= FRESH_S

    def _look_at(self, i: int, now: float) -> None:
        hop = self._hops[i]
        if hop.arrivals is None or self._newest(i) <= hop.arrivals.probe:
            hop.waits_since = None
        elif hop.waits_since is None:
            hop.waits_since = now

    def _newest(self, hop: int) -> int:
        """Return the newest PROBE that the sender of a Hop has."""
        return self.probe(hop - 1) if hop else self._num_sent


@dataclass(slots=True)
class _Trouble:
    """epoch, probe: the newest that had come through when the Hop was found dead."""

    epoch: Epoch
    probe: int
    carries_since: float | None = None


@dataclass(slots=True)
class HopTroubles:
    """Remembers which Hops were dead, by the names of their ends: the Ring may change.

    barred: the Nodes that others are to replace, each with its dead Hop and since when. The Ring may go on with such a
    Node when the Hop carries again; once the Ring goes without it, after BARRED_S.
    """

    barred: dict[str, tuple[HopNames, float]] = field(default_factory=dict)
    _troubles: dict[HopNames, _Trouble] = field(default_factory=dict)

    def died(self, hop: HopNames, epoch: Epoch, probe: int, now: float) -> bool:
        """Note that a Hop is dead; return whether it is so again, and not worth another try."""
        before = self._troubles.get(hop)
        self._troubles[hop] = _Trouble(epoch, probe)
        return before is not None and (before.carries_since is None or now - before.carries_since < AGAIN_S)

    def came(self, hop: HopNames, epoch: Epoch, probe: int, now: float) -> bool:
        """Note the newest PROBE that has come over a Hop; return whether a dead Hop carries again by that."""
        trouble = self._troubles.get(hop)
        if trouble is None or trouble.carries_since is not None or not probe:
            return False
        if (epoch, probe) <= (trouble.epoch, trouble.probe):
            return False
        trouble.carries_since = now
        self.barred = {name: (other, at) for name, (other, at) in self.barred.items() if other != hop}
        return True

    def dead_among(self, hops: list[HopNames]) -> list[HopNames]:
        """Return those Hops that were dead and have not carried anything since."""
        return [hop for hop in hops if hop in self._troubles and self._troubles[hop].carries_since is None]

    def num_at(self, name: str) -> int:
        """Return how many Hops of a Node were dead and have not carried anything since."""
        return len([hop for hop, each in self._troubles.items() if name in hop and each.carries_since is None])

    def bar(self, name: str, hop: HopNames, now: float) -> None:
        """Have others replace a Node, because of a dead Hop."""
        self.barred[name] = hop, now

    def let_in(self, ring: list[str], now: float, *, all_of_ring: bool) -> bool:
        """Let Nodes in that have been out of the Ring for long, and all in it if wanted; return whether any are."""
        before = len(self.barred)
        self.barred = {
            name: (hop, at)
            for name, (hop, at) in self.barred.items()
            if (not all_of_ring if name in ring else now - at < BARRED_S)
        }
        return len(self.barred) < before
