"""How devices are best divided into rings: which divisions are compared, where the users go, which Layout wins. Pure.

A whole copy is a ring of one device. This is the one rule for `mdiq plan`, `mdiq simulate` and `mdiq report`; each has
its own figures for what a ring of some devices gives some users. See docs/many-rings.md.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

MAX_DEVICES = 6
"""Up to so many devices, all divisions are compared: 203 of six."""
_MAX_DEALT = 24
_SAME = 1.02  # rates that differ by less are the same


class Ring(Protocol):
    """A planned ring. rate: tokens per second of its users together; num_used: devices that hold Layers."""

    @property
    def rate(self) -> float: ...

    @property
    def num_used(self) -> int: ...


D = TypeVar("D")
R = TypeVar("R", bound=Ring)


@dataclass(frozen=True, slots=True)
class Layout(Generic[R]):
    """The rings that have users. rings: [(how many are alike, the ring)]."""

    rings: tuple[tuple[int, R], ...]

    def __str__(self) -> str:
        return "; ".join(str(ring) for _, ring in self.rings)

    @property
    def num_rings(self) -> int:
        return sum(count for count, _ in self.rings)

    @property
    def rate(self) -> float:
        """Tokens per second of all users together."""
        return sum(count * ring.rate for count, ring in self.rings)

    @property
    def num_used(self) -> int:
        """Devices that hold Layers."""
        return sum(count * ring.num_used for count, ring in self.rings)


def divisions(devices: Sequence[D], users: int, num_groups: int | None = None) -> Iterator[Mapping[tuple[D, ...], int]]:
    """Yield divisions of the devices, the fastest first, into groups; each as {group: how many are alike}.

    Few devices are divided in all ways. Many are dealt in turn to 1 to ``users`` groups: to each number of groups that
    a size of the groups gives, or to some of these numbers, evenly spread. num_groups: only into so many.
    """
    if len(devices) <= MAX_DEVICES:
        different = {frozenset((found := Counter(groups)).items()): found for groups in _partitions(tuple(devices))}
        yield from (found for found in different.values() if num_groups in (None, found.total()))
        return
    numbers = sorted({len(devices) // size for size in range(1, len(devices) + 1)})
    numbers = [number for number in numbers if number <= users]
    if len(numbers) > _MAX_DEALT:
        step = (len(numbers) - 1) / (_MAX_DEALT - 1)
        numbers = [numbers[round(i * step)] for i in range(_MAX_DEALT)]
    for number in numbers if num_groups is None else [num_groups]:
        yield Counter(tuple(devices[i::number]) for i in range(number))


def lay_out(division: Mapping[D, int], users: int, ring: Callable[[D, int], R | None]) -> Layout[R] | None:
    """Return the division with the users spread over its groups; None if it has no room for them.

    ring: called with a group and its users; returns their ring, or None if the group cannot hold the model for them.
    """

    def rate(group: D, num_users: int) -> float:
        found = ring(group, num_users)
        return 0.0 if found is None else found.rate

    rings: list[tuple[int, R]] = []
    for (group, number), together in zip(division.items(), spread(division, users, rate), strict=True):
        for count, each in evenly(together, number):
            found = ring(group, each)
            if found is None:
                return None
            rings.append((count, found))
    return Layout(tuple(rings))


def spread(division: Mapping[D, int], users: int, rate: Callable[[D, int], float]) -> list[int]:
    """Return how many users alike groups have together, if each next user goes to the group where it gets most.

    rate: called with a group and its users; returns the tokens per second of these users together.

    A user's part of the rate must not grow with the users of its group. Then nobody gains by a move to another group,
    which few numbers of users show: those of a start in proportion to the rates, and of moves by several users at once.
    """
    groups, counts = list(division), list(division.values())
    if len(groups) == 1:
        return [users]
    each = max(users // sum(counts), 1)
    weights = [count * rate(group, each) or 1e-9 for group, count in division.items()]
    given = [int(users * weight / sum(weights)) for weight in weights]
    for i in range(users - sum(given)):
        given[i] += 1

    def part(i: int, number: int) -> float:
        """Return what the last of so many users gets."""
        of_one = -(-number // counts[i])
        return rate(groups[i], of_one) / of_one

    def move(step: int) -> bool:
        """Move so many users to where they get most, if all of them gain; return whether they do."""
        losses = [(part(i, number - step + 1), i) for i, number in enumerate(given) if number >= step]
        if not losses:
            return False
        loss, source = min(losses)
        gain, target = max((part(i, number + step), i) for i, number in enumerate(given) if i != source)
        if gain > loss:
            given[source] -= step
            given[target] += step
        return gain > loss

    step = 1
    while move(step):
        step *= 2
    while step > 1:
        step //= 2
        all(move(step) for _ in groups)  # not for ever, should a part grow with the users after all
    while move(1):
        pass
    return given


def evenly(users: int, num_rings: int) -> list[tuple[int, int]]:
    """Return alike rings with their users, [(how many rings, users of each)], without rings that have none."""
    each, more = divmod(users, num_rings)
    return [(count, number) for count, number in ((more, each + 1), (num_rings - more, each)) if count and number]


def best_of(found: Sequence[Layout[R]]) -> Layout[R]:
    """Return the Layout with the highest rate; of nearly equal ones that with fewest devices, then with most rings."""
    best = max(layout.rate for layout in found)
    equal = [layout for layout in found if layout.rate * _SAME >= best]
    return min(equal, key=lambda layout: (layout.num_used, -layout.num_rings))


def _partitions(devices: tuple[D, ...]) -> Iterator[list[tuple[D, ...]]]:
    """Yield the ways to divide devices into groups."""
    if not devices:
        yield []
        return
    first, rest = devices[0], devices[1:]
    for mask in range(1 << len(rest)):
        group = (first, *(each for i, each in enumerate(rest) if mask >> i & 1))
        left = tuple(each for i, each in enumerate(rest) if not mask >> i & 1)
        for others in _partitions(left):
            yield [group, *others]
