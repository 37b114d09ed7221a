"""How many Layers each Node gets: the split with the highest rate under the memory limits. It may leave Nodes out.

The Ring's order is the order in which the Nodes are given, the Starter first; the search decides which of the others
take part. Layers are alike, so a split is a count per Node, and a Stage's time is linear in that count.

latency: one user's Lap is the sum of all Stages and Hops. A dynamic program over Nodes and Layers minimizes it: for
every i and l, the minimum time in which l Layers are done and Node i was the last one.

throughput: the rate of plan/micro_batches.py for the best number of micro-batches. It falls with two figures: the busy
time per Lap of the slowest Stage or line, and the time of a Lap. The dynamic program gives the shortest Lap in which
none is busy for longer than a bound. The search is branch and bound, best first, over intervals of all values that
this bound can have: an interval's minimum busy time and a lower bound of its Laps give an upper bound of its rate. It
stops when no interval can hold a better split than the best so far. The result is the optimum.
"""

import heapq
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import accumulate, pairwise

from mdiq.plan.micro_batches import MAX_LIVE, Grouping, groupings
from mdiq.plan.profile import Links, ModelShape, NodeProfile

_ROUNDING = 1e-9  # of a number of Layers: a bound is one of the values themselves
_BETTER = 1e-12  # a rate that is higher by less is the same
_NEVER = math.inf

Split = tuple[int, ...]
"""Layers of each Node; 0: left out."""


class Objective(StrEnum):
    """What the split is best for."""

    LATENCY = "latency"
    THROUGHPUT = "throughput"


@dataclass(frozen=True, slots=True)
class Goal:
    """The operator's goal for the Plan.

    num_users: Sequences that are live at once; a Plan for latency is computed for one, whatever this says.
    kv_tokens: minimum KV capacity; max_kv_tokens: maximum, None for all the room that there is.
    context_tokens: context of a Sequence for which the times are predicted.
    min_starter_layers: the first so many Layers stay on the Starter.
    """

    objective: Objective = Objective.THROUGHPUT
    num_users: int = 4
    kv_tokens: int = 2_048
    max_kv_tokens: int | None = None
    context_tokens: int = 0
    min_starter_layers: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.num_users <= MAX_LIVE or self.kv_tokens < 1 or self.context_tokens < 0:
            raise ValueError(f"{self}: it needs 1 to {MAX_LIVE} users and at least 1 token of KV capacity")
        if self.min_starter_layers < 1:
            raise ValueError(f"{self}: the Starter has at least 1 layer")


def best_split(
    model: ModelShape, nodes: Sequence[NodeProfile], links: Links, goal: Goal, *, all_nodes: bool = False
) -> Split | None:
    """Return the best split of the model over these Nodes, the Starter first, or None when the model does not fit.

    all_nodes: use every Node.
    """
    found = find_split(model, nodes, links, goal, all_nodes=all_nodes)
    return None if found is None else found[0]


def find_split(
    model: ModelShape,
    nodes: Sequence[NodeProfile],
    links: Links,
    goal: Goal,
    *,
    all_nodes: bool = False,
    above: float = 0.0,
) -> tuple[Split, float] | None:
    """Return the best split and its rate by the goal; None when there is none with a rate ``above`` this one."""
    layer_s = {
        size: [node.layer_s(size, goal.context_tokens) for node in nodes]
        for size in {size for way in _ways(goal) for size in (way.size, way.largest)}
    }
    most = [node.max_layers(model, goal.kv_tokens, is_starter=not i) for i, node in enumerate(nodes)]
    if most[0] < goal.min_starter_layers:
        return None
    searches = [
        _Search(model, nodes, links, way, layer_s, most, all_nodes=all_nodes, min_first=goal.min_starter_layers)
        for way in _ways(goal)
    ]
    best: tuple[Split, float] | None = None
    if most[0] == model.num_layers and not (all_nodes and len(nodes) > 1):
        # The first Grouping is a single micro-batch, the only one of a Starter alone.
        rate = searches[0].rate(0.0, searches[0].alone_s())
        if rate > above:
            best = (model.num_layers, *[0] * (len(nodes) - 1)), rate
    return _search(searches, best, above)


def _ways(goal: Goal) -> list[Grouping]:
    return groupings(1 if goal.objective is Objective.LATENCY else goal.num_users)


def _search(
    searches: Sequence["_Search"], best: tuple[Split, float] | None, above: float
) -> tuple[Split, float] | None:
    """Return the best split of all Groupings and its rate; see the module's text."""
    best_rate = above if best is None else best[1]
    # (minus the highest possible rate, Grouping, first and last of the remaining bounds, shortest Lap)
    queue = [(-search.rate(search.min_busy_s, search.min_lap_s), i, -1, -1, 0.0) for i, search in enumerate(searches)]
    heapq.heapify(queue)
    while queue and -queue[0][0] > best_rate * (1 + _BETTER):
        _, i, low, high, lap_s = heapq.heappop(queue)
        search = searches[i]
        if low < 0:
            low, high = search.first_bound(), len(search.bounds) - 1
            middle = high if search.is_single else (low + high) // 2
            lap_s = search.min_lap_s
        else:
            middle = (low + high) // 2
        split = search.shortest_lap(search.bounds[middle]) if low <= high else None
        left: list[tuple[int, int, float]] = [(middle + 1, high, lap_s)]
        if split is not None:
            busy_s, split_lap_s = search.figures(split)
            rate = search.rate(busy_s, split_lap_s)
            if rate > best_rate * (1 + _BETTER):
                best, best_rate = (split, rate), rate
            left.append((low, bisect_left(search.bounds, busy_s * (1 - _ROUNDING)) - 1, split_lap_s))
        for first, last, min_lap_s in left:
            if first <= last:
                min_lap_s = max(min_lap_s, search.min_lap(search.bounds[last]))
                possible = search.rate(search.bounds[first], min_lap_s)
                heapq.heappush(queue, (-possible, i, first, last, min_lap_s))
    return best


class _Search:
    """Splits of a model for one Grouping of the users."""

    def __init__(
        self,
        model: ModelShape,
        nodes: Sequence[NodeProfile],
        links: Links,
        way: Grouping,
        layer_s: Mapping[int, Sequence[float]],
        most: Sequence[int],
        *,
        all_nodes: bool,
        min_first: int,
    ) -> None:
        self._min_first = min_first  # Layers of the Starter
        self._num_layers = model.num_layers
        self._way = way
        self.is_single = way.num_batches == 1
        self._most = most
        self._all_nodes = all_nodes
        # Of a Node: the time of its Layers and of the rest per Lap, for all micro-batches and for the largest one.
        self._lap_layer = layer_s[way.largest]
        self._busy_layer = [way.busy_s(*s) for s in zip(layer_s[way.size], layer_s[way.largest], strict=True)]
        fixed_s = [[node.fixed_s(n, is_starter=not i) for i, node in enumerate(nodes)] for n in (way.size, way.largest)]
        self._lap_fixed = fixed_s[1]
        self._busy_fixed = [way.busy_s(*s) for s in zip(*fixed_s, strict=True)]
        self._by_speed = sorted(range(len(nodes)), key=lambda i: self._lap_layer[i])

        def hop(sender: int, receiver: int) -> tuple[float, float]:
            """Return a Hop's seconds per Lap: its line is busy with all micro-batches; a Lap has the largest."""
            between = links.between(nodes[sender].name, nodes[receiver].name)
            return (
                between.send_s(way.num_batches, way.num_live, model),
                between.delay_s + between.send_s(1, way.largest, model),
            )

        self._hop = hop
        self._hops: dict[tuple[int, int], tuple[float, float]] = {}
        self._bounds: list[float] = []
        relaxed = self._filled(list(most))
        self.min_lap_s = sum(n * self._lap_layer[i] for i, n in enumerate(relaxed or ())) + self._lap_fixed[0]
        self.min_busy_s = self._busy_fixed[0] + min_first * self._busy_layer[0] if relaxed else _NEVER

    @cached_property
    def _min_hops(self) -> list[float]:
        """The shortest Hop to each Node."""
        return [min((self._hop_s(a, b)[1] for a in self._before(b)), default=0.0) for b in range(len(self._most))]

    @property
    def bounds(self) -> Sequence[float]:
        """All values that the busy time of the slowest Stage or line can have, in order."""
        if not self._bounds:
            values = {
                fixed_s + n * layer_s
                for fixed_s, layer_s, most in zip(self._busy_fixed, self._busy_layer, self._most, strict=True)
                for n in range(1, most + 1)
            }
            values |= {self._hop_s(a, b)[0] for b in range(len(self._most)) for a in self._before(b)}
            self._bounds = sorted(values)
        return self._bounds

    def rate(self, busy_s: float, lap_s: float) -> float:
        """Return the rate in a Ring of more than one Stage."""
        return self._way.rate(busy_s, lap_s)

    def alone_s(self) -> float:
        """Return the Starter's time for all Layers."""
        return self._lap_fixed[0] + self._num_layers * self._lap_layer[0]

    def figures(self, split: Split) -> tuple[float, float]:
        """Return the busy time per Lap of the slowest Stage or line, and the time of a Lap."""
        used = [i for i, n in enumerate(split) if n]
        hops = [self._hop_s(a, b) for a, b in pairwise([*used, used[0]])]
        busy_s = max(self._busy_fixed[i] + split[i] * self._busy_layer[i] for i in used)
        lap_s = sum(self._lap_fixed[i] + split[i] * self._lap_layer[i] for i in used)
        return max(busy_s, *(hop[0] for hop in hops)), lap_s + sum(hop[1] for hop in hops)

    def first_bound(self) -> int:
        """Return the index of the smallest bound under which the Layers have room, without the Hops."""
        return bisect_left(self.bounds, True, key=lambda bound: self._filled(self._caps(bound)) is not None)

    def min_lap(self, max_busy_s: float) -> float:
        """Return a lower bound of the Lap if no Stage or line is busy for longer than ``max_busy_s``.

        A Node's own part is spread over the Layers that it can have, as if it came with each of them. Layers that the
        Starter must have are left free to go elsewhere: that only lowers the bound.
        """
        if self._all_nodes:
            return 0.0
        caps = self._caps(max_busy_s)
        own_s = [fixed_s + hop_s for fixed_s, hop_s in zip(self._lap_fixed, self._min_hops, strict=True)]
        costs = (
            (layer_s + (own_s[i] / cap if i else 0.0), cap)
            for i, (layer_s, cap) in enumerate(zip(self._lap_layer, caps, strict=True))
            if cap
        )
        left, lap_s = self._num_layers, own_s[0]
        for cost_s, cap in sorted(costs):
            lap_s += min(cap, left) * cost_s
            left -= min(cap, left)
        return lap_s

    def shortest_lap(self, max_busy_s: float) -> Split | None:
        """Return the split with the shortest Lap within ``max_busy_s``, or None when there is none."""
        caps = self._caps(max_busy_s)
        if self._all_nodes:
            # The Hops are fixed, and Layers go where they are fastest.
            filled = self._filled(caps)
            assert filled is not None  # the search begins with the first bound under which there is room
            return filled if self.figures(filled)[0] <= max_busy_s * (1 + _ROUNDING) else None
        return self._shortest_lap(caps, max_busy_s)

    def _caps(self, max_busy_s: float) -> list[int]:
        """Return how many Layers each Node can run within ``max_busy_s``."""
        caps: list[int] = []
        for fixed_s, layer_s, most in zip(self._busy_fixed, self._busy_layer, self._most, strict=True):
            layers = (max_busy_s - fixed_s) / layer_s if layer_s > 0 else math.copysign(_NEVER, max_busy_s - fixed_s)
            caps.append(int(max(min(layers + _ROUNDING, most), 0)))
        return caps

    def _filled(self, caps: Sequence[int]) -> Split | None:
        """Return the fastest split without the Hops, or None when there is no room for the Layers."""
        least = [self._min_first, *[int(self._all_nodes)] * (len(caps) - 1)]
        left = self._num_layers - sum(least)
        if left < 0 or any(cap < n for cap, n in zip(caps, least, strict=True)):
            return None
        for i in self._by_speed:
            more = min(caps[i] - least[i], left)
            least[i] += more
            left -= more
        return tuple(least) if not left else None

    def _before(self, i: int) -> range:
        """Return the Nodes that may send to Node i."""
        if self._all_nodes:
            return range(i - 1, i) if i else range(len(self._most) - 1, len(self._most))
        return range(i) if i else range(1, len(self._most))

    def _hop_s(self, sender: int, receiver: int) -> tuple[float, float]:
        found = self._hops.get((sender, receiver))
        if found is None:
            found = self._hops[sender, receiver] = self._hop(sender, receiver)
        return found

    def _shortest_lap(self, caps: Sequence[int], max_busy_s: float) -> Split | None:
        """The dynamic program over Nodes and Layers."""
        num_layers, max_busy_s = self._num_layers, max_busy_s * (1 + _ROUNDING)
        rest = [*accumulate(reversed(caps))][::-1] + [0]  # Layers that the Nodes from i on can take
        # entered[i][l]: the minimum time in which the Nodes before i have run l Layers and the rows are at Node i.
        entered = {0: [0.0] + [_NEVER] * num_layers}
        if caps[0] < self._min_first:
            return None
        alone_s = self._run(0, caps[0], entered[0], 0, 0)
        done = {0: [_NEVER] * self._min_first + alone_s[self._min_first :]}
        before = caps[0]
        for i in range(1, len(caps)):
            # Fewer Layers than low leave too many to the later Nodes, and more than high do not fit before this one.
            low, high = max(num_layers - rest[i], self._min_first), min(before, num_layers - 1)
            if caps[i] and low <= high:
                times_s = [_NEVER] * (high - low + 1)
                # Many Hops are alike; min() over many rows is faster than one row after the other.
                rows: dict[float, list[list[float]]] = {}
                for j, row in done.items():
                    busy_s, hop_s = self._hop_s(j, i)
                    if busy_s <= max_busy_s:
                        rows.setdefault(hop_s, [times_s]).append(row[low : high + 1])
                for hop_s, alike in rows.items():
                    fastest = map(min, *alike)
                    times_s = [a if a <= (b := t + hop_s) else b for a, t in zip(times_s, fastest, strict=True)]
                entered[i] = [_NEVER] * low + times_s + [_NEVER] * (num_layers - high)
                done[i] = self._run(i, caps[i], entered[i], low, high)
            before += caps[i]
        ends = [
            (row[num_layers] + self._hop_s(i, 0)[1], i)
            for i, row in done.items()
            if i and self._hop_s(i, 0)[0] <= max_busy_s
        ]
        lap_s, last = min(ends, default=(_NEVER, 0))
        return self._trace(last, caps, max_busy_s, done, entered) if lap_s < _NEVER else None

    def _run(self, i: int, cap: int, entered: Sequence[float], low: int, high: int) -> list[float]:
        """Return the minimum times in which Node i has done l Layers, if it was entered with ``low`` to ``high``."""
        layer_s, last = self._lap_layer[i], min(high + cap, self._num_layers)
        lines_s = [entered[n] - n * layer_s for n in range(low, high + 1)]
        min_s = [
            t + n * layer_s + self._lap_fixed[i] for n, t in enumerate(_min_before(lines_s, cap, last - low), low + 1)
        ]
        return [_NEVER] * (low + 1) + min_s + [_NEVER] * (self._num_layers - last)

    def _trace(
        self,
        last: int,
        caps: Sequence[int],
        max_busy_s: float,
        done: dict[int, list[float]],
        entered: dict[int, list[float]],
    ) -> Split:
        """Return the split with all Layers done after Node ``last``: traces the choices backwards."""
        split = [0] * len(caps)
        i, layers = last, self._num_layers
        while i:
            counts = range(1, min(caps[i], layers) + 1)
            split[i] = min(counts, key=lambda n: entered[i][layers - n] + n * self._lap_layer[i])
            layers -= split[i]
            senders = [j for j in done if j < i and self._hop_s(j, i)[0] <= max_busy_s]
            i = min(senders, key=lambda j: done[j][layers] + self._hop_s(j, i)[1])
        split[0] = layers
        return tuple(split)


def _min_before(values: Sequence[float], width: int, count: int) -> list[float]:
    """Return for every k from 1 to ``count`` the minimum of the ``width`` values before index k."""
    least: list[float] = []
    window: deque[int] = deque()  # indices whose values grow
    for k in range(1, count + 1):
        if k <= len(values):
            while window and values[window[-1]] >= values[k - 1]:
                window.pop()
            window.append(k - 1)
        if window[0] < k - width:
            window.popleft()
        least.append(values[window[0]])
    return least
