"""How long the event loop of each Node takes for a forward: Frames, and on the Starter also requests and their answers.

Theory. A Stage's cost is measured with forwards alone. While it serves, its event loop receives, checks, packs and
sends Frames too, and the Starter's also takes requests and sends each token to its client. Where all cores compute,
which is the default, this takes time from the forwards: it is a part of a Stage's time on every Lap. It depends on the
device and on what clients ask, so it is measured: CPU seconds of the event loop's thread over the forwards of the same
window, smoothed over windows. A window with few forwards says nothing: an idle loop also wakes up now and then. So a
window begins anew, too, when a look finds that nothing was computed since the one before.
"""

from collections.abc import Mapping

from mdiq.core.work import Work

MIN_FORWARDS = 50
MAX_WINDOW_S = 30.0  # fewer forwards than MIN_FORWARDS in this time are no load
MAX_HANDLING_S = 0.1  # a forward's; more is a loop that does other things
GAIN = 0.25  # of the newest window in the smoothed value
NEWS, MIN_NEWS_S = 0.25, 2e-4  # a change by this share, and by so many seconds, is worth a new pace


class Handling:
    """The seconds per forward of each Node that has been seen to serve."""

    def __init__(self) -> None:
        self._begins: dict[str, tuple[float, Work]] = {}
        self._seen: dict[str, Work] = {}
        self._seconds: dict[str, float] = {}
        self._told: dict[str, float] = {}

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds per forward by Node, as they were when ``observe`` last returned True."""
        return self._told

    def observe(self, now: float, works: Mapping[str, Work]) -> bool:
        """Take in what Nodes have done so far; return whether ``seconds`` has changed noticeably.

        now: seconds of any monotonic clock.
        """
        for name, work in works.items():
            begun_s, begin = self._begins.setdefault(name, (now, work))
            is_idle = work.num_forwards == self._seen.get(name, work).num_forwards
            self._seen[name] = work
            done = work.since(begin)
            if done is not None and done.num_forwards >= MIN_FORWARDS:
                handling_s = min(done.handling_s / done.num_forwards, MAX_HANDLING_S)
                before_s = self._seconds.get(name, handling_s)
                self._seconds[name] = before_s + GAIN * (handling_s - before_s)
            elif done is not None and now - begun_s <= MAX_WINDOW_S and not is_idle:
                continue
            self._begins[name] = now, work
        if not any(is_news(handling_s, self._told.get(name, 0.0)) for name, handling_s in self._seconds.items()):
            return False
        self._told = dict(self._seconds)
        return True


def is_news(now_s: float, told_s: float) -> bool:
    """Return whether seconds per forward have changed so much that plans may differ."""
    return abs(now_s - told_s) > max(NEWS * told_s, MIN_NEWS_S)
