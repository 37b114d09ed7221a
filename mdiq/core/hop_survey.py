"""How long each Hop takes and how much it carries, from bursts of Frames that Nodes time on their own clocks. No I/O.

A Hop is one way, so nothing can be sent back on it, and the clocks of Nodes are not synchronized. But every Node
answers the Starter over the control channel: if a request leaves at a, the Node reports its time t, and the answer
arrives at b, then that clock is ahead by t - (a + b) / 2, with an error of at most (b - a) / 2. With known clock
offsets, a Frame's delay is its arrival minus its departure. Around the Ring the errors cancel: the sum of the delays
is correct, however far the clocks are off.

Single Frames give the delay: the minimum of several, since waiting only adds to it. Bursts give the bandwidth: the
bytes after the first Frame divided by the time that they took. Only the receiver's clock counts, so the sender's
buffers do not distort it. Bursts grow until one takes long enough to stand out from buffering. If a burst suddenly
takes much longer, it may have been held up: it is sent again, and the better rate counts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from mdiq.core.control import BurstArrived, SendBurst
from mdiq.core.frame import Frame, FrameKind, Segment
from mdiq.core.types import Epoch, SeqId
from mdiq.core.wire import WireLimits, WirePayload, frame_bytes
from mdiq.core.wire_formats import WIRE_FORMATS

NUM_SINGLE = 5
SINGLE_BYTES = 64
BURST_FRAMES = 16
FIRST_FRAME_BYTES = 128
MAX_FRAME_BYTES = 128 * 1024
GROWTH = 4
ENOUGH_S = 0.1  # the next burst may take GROWTH times as long: a slow link is measured within a second
_SUDDEN = 2  # so many times below the rate of the burst before
_MIN_S = 1e-6  # finer than clocks can tell on such a way
_FORMAT = "f32"
_ELEMENT_BYTES = WIRE_FORMATS[_FORMAT].element_bytes


@dataclass(frozen=True, slots=True)
class HopLink:
    """Delay and bandwidth of a Hop, one way. delay_s: of a small Frame, the event loops at both ends included."""

    delay_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class BurstReport:
    """The times of one burst.

    asked_s, answered_s: when the sender was asked and when its answer arrived, on the Starter's clock.
    sent_s: when its first Frame left, on the sender's clock. arrived: the receiver's report, on the receiver's clock.
    """

    asked_s: float
    answered_s: float
    sent_s: float
    arrived: BurstArrived


class HopSurvey:
    """Chooses the next burst, one Hop after the other, and computes the links from the reports.

    Hop i leaves Stage i; the last one returns to the Starter, whose clock is the reference. numbers: those of the
    bursts; none is used twice in one Epoch, since Nodes answer a question that they know from memory.
    """

    def __init__(self, epoch: Epoch, num_hops: int, numbers: Iterator[int] | None = None) -> None:
        self._epoch = epoch
        self._num_hops = num_hops
        self._numbers = count(1) if numbers is None else numbers
        self._hop = 0
        self._num_singles = 0
        self._frame_bytes = FIRST_FRAME_BYTES
        self._ways_s: dict[int, float] = {}  # by Hop, from one clock to another
        self._rates: dict[int, float] = {}
        self._doubted_rate: float | None = None  # of a burst that is sent again
        self._clocks: dict[int, tuple[float, float]] = {0: (0.0, 0.0)}  # by Stage: (how sure, seconds ahead)

    def next_burst(self) -> tuple[int, SendBurst] | None:
        """Return the Hop to measure and the request to its sender, or None when all are measured."""
        if self._hop == self._num_hops:
            return None
        number = next(self._numbers)
        if self._num_singles < NUM_SINGLE:
            return self._hop, SendBurst(self._epoch, number, 1, SINGLE_BYTES)
        return self._hop, SendBurst(self._epoch, number, BURST_FRAMES, self._frame_bytes)

    def reported(self, report: BurstReport) -> None:
        """Process the report of the newest burst."""
        hop, arrived = self._hop, report.arrived
        if hop:
            doubt_s = report.answered_s - report.asked_s
            ahead_s = report.sent_s - (report.asked_s + report.answered_s) / 2
            self._clocks[hop] = min(self._clocks.get(hop, (doubt_s, ahead_s)), (doubt_s, ahead_s))
        if self._num_singles < NUM_SINGLE:
            self._num_singles += 1
            way_s = arrived.first_s - report.sent_s
            self._ways_s[hop] = min(self._ways_s.get(hop, way_s), way_s)
            return
        if not arrived.later_bytes:  # only its last Frame has come, which tells nothing of the rate
            self.missed()
            return
        seconds = max(arrived.last_s - arrived.first_s, _MIN_S)
        rate = arrived.later_bytes / seconds
        is_long = seconds >= ENOUGH_S
        if is_long and self._doubted_rate is None and rate * _SUDDEN < self._rates.get(hop, math.inf):
            self._doubted_rate = rate
            return
        self._rates[hop] = max(rate, self._doubted_rate or 0.0)
        self._doubted_rate = None
        if is_long or self._frame_bytes >= MAX_FRAME_BYTES:
            self._go_on()
        else:
            self._frame_bytes = min(self._frame_bytes * GROWTH, MAX_FRAME_BYTES)

    def missed(self) -> None:
        """Give up on this Hop: the newest burst did not arrive."""
        self._rates.pop(self._hop, None)
        self._go_on()

    def links(self) -> tuple[HopLink | None, ...]:
        """Return each Hop's link; None where it was given up, or where the clock of one of its ends is unknown."""
        return tuple(self._link(hop) for hop in range(self._num_hops))

    def _go_on(self) -> None:
        self._hop += 1
        self._num_singles = 0
        self._frame_bytes = FIRST_FRAME_BYTES
        self._doubted_rate = None

    def _link(self, hop: int) -> HopLink | None:
        sender, receiver = self._clocks.get(hop), self._clocks.get((hop + 1) % self._num_hops)
        if hop not in self._rates or sender is None or receiver is None:
            return None
        return HopLink(max(self._ways_s[hop] + sender[1] - receiver[1], 0.0), self._rates[hop])


def burst_frames(burst: SendBurst, limits: WireLimits) -> list[Frame]:
    """Return the Frames of a burst, of about the requested size and within the Ring's limits."""
    width = min(max(burst.frame_bytes // _ELEMENT_BYTES, 1), limits.max_width)
    max_rows = min(limits.max_tokens, limits.max_context - burst.num_frames)
    num_rows = max(min(burst.frame_bytes // (_ELEMENT_BYTES * width), max_rows), 1)
    payload = WirePayload(_FORMAT, width, memoryview(bytes(num_rows * width * _ELEMENT_BYTES)))
    return [
        Frame(Epoch(burst.epoch), FrameKind.BURST, (Segment(SeqId(burst.number), left, num_rows),), payload)
        for left in reversed(range(burst.num_frames))
    ]


class BurstMeter:
    """Times the Frames of a burst at the receiving end of a Hop. An incomplete burst is dropped."""

    def __init__(self) -> None:
        self._number = -1
        self._first_s = 0.0
        self._later_bytes = 0

    def arrived(self, frame: Frame, now: float) -> BurstArrived | None:
        """Count a Frame of a burst; return the report if it was the last one."""
        (segment,) = frame.segments
        if segment.seq_id != self._number:
            self._number, self._first_s, self._later_bytes = segment.seq_id, now, 0
        else:
            self._later_bytes += frame_bytes(1, len(frame.payload.parts()[2][0]))
        if segment.start:
            return None
        self._number = -1
        return BurstArrived(frame.epoch, segment.seq_id, self._first_s, now, self._later_bytes)
