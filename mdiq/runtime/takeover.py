"""Which Ring goes on when Nodes of it are lost: spares have their Layers, or the Nodes before and after do.

Values in, values out. Who is left keeps what he has, so that only the Layers of the lost have to be loaded, unless a
Ring that is shared out anew is clearly faster: of three Nodes with a third each, the first two would be left with one
and two thirds when the last is lost, and it may stay away for days.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from types import MappingProxyType

from mdiq.core.types import LayerRange
from mdiq.runtime.options import RemoteNode, RemoteRing, RingOptions, StandingBy

_CLEARLY = 1.1
"""How many times as fast a Ring that is shared out anew has to be: below that, a shorter pause is worth more."""


@dataclass(frozen=True, slots=True)
class Able:
    """What a Node can do.

    layer_s: what a forward of a Layer costs, in any unit. max_layers: that its memory holds. head_layers: the Starter's
    other work for a token, in Layers.
    """

    layer_s: float
    max_layers: int
    head_layers: float = 0.0

    def seconds(self, num_layers: int) -> float:
        """Return what a token costs with so many Layers, in the unit of ``layer_s``."""
        return (num_layers + self.head_layers) * self.layer_s


def with_spares(options: RingOptions, missing: Collection[str], spares: Sequence[str]) -> RingOptions:
    """Return the Ring in which spares have the places of as many missing Nodes as there are spares."""
    remote = _remote(options)
    known = {node.name: node for node in remote.spares}
    free = [known[name] for name in spares if name in known]
    for name in missing:
        if free:
            options = _replaced(options, name, free.pop(0))
    return options


def with_survivors(
    options: RingOptions,
    missing: Collection[str],
    able: Mapping[str, Able],
    at_hand: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> RingOptions | None:
    """Return the Ring without the missing Nodes: the Nodes before and after take their Layers, so that the slower of
    them is as fast as can be; or all that are left share the Layers anew, if nobody has to fetch for it, and the
    slowest is clearly faster then or those beside have no room. None where their memory does not hold them.

    able: at least of the Nodes that are left. at_hand: Layers that they have; those that they hold, if it is not said.
    The Starter has all.
    """
    remote = _remote(options)
    ranges = {node.name: layers for node, layers in zip(remote.nodes, options.layers, strict=True)}
    names = [node.name for node in remote.nodes if node.name not in missing]
    wires = {node.name: options.wires[i % len(options.wires)] for i, node in enumerate(remote.nodes)}
    num_first, stop = len(options.layers[0]), options.layers[-1].stop
    beside = _taken_beside(ranges, names, able, stop)
    max_s = max(able[name].seconds(len(layers)) for name, layers in beside.items()) / _CLEARLY if beside else inf
    has = [range(stop), *(at_hand.get(name, {*ranges[name]}) for name in names[1:])]
    shared = _shared_anew([able[name] for name in names], has, num_first, max_s)
    if beside is None and shared is None:
        return None
    ranges, how = beside or {}, "the nodes beside it took over"
    if shared is not None:
        ranges, how = dict(zip(names, shared, strict=True)), "those that are left share the layers anew"
    lost = [node for node in remote.nodes if node.name in missing]
    return replace(
        options,
        layers=tuple(ranges[name] for name in names),
        wires=tuple(wires[name] for name in names) if len(options.wires) > 1 else options.wires,
        remote=replace(
            remote,
            nodes=tuple(node for node in remote.nodes if node.name not in missing),
            standing_by=(*remote.standing_by, *(_set_aside(node, how) for node in lost)),
            spares=(*remote.spares, *lost),
        ),
    )


def standby_layers(options: RingOptions, num_more: Callable[[str], int]) -> dict[str, LayerRange]:
    """Return the Layers that Nodes are to have on their disks, so that they can take over at once.

    num_more: how many Layers a Node of the Ring could hold beside its own.
    """
    remote, layers = options.remote, options.layers
    if remote is None or len(layers) == 1:
        return {}
    wanted = {}
    for i, node in enumerate(remote.nodes[1:], 1):
        more = num_more(node.name) if node.keeps_standby_layers else 0
        start = max(layers[max(i - 1, 1)].start, layers[i].start - more)
        stop = min(layers[min(i + 1, len(layers) - 1)].stop, layers[i].stop + more)
        if more:
            wanted[node.name] = LayerRange(start, stop)
    every = LayerRange(layers[1].start, layers[-1].stop)
    return {**{node.name: every for node in remote.spares if node.keeps_standby_layers}, **wanted}


def with_newcomers(options: RingOptions, planned: RingOptions) -> RingOptions:
    """Return the Ring as it is, with a planned one's keys, and with those standing by that it lacks: they may join."""
    remote, wanted = _remote(options), _remote(planned)
    new = [node for node in wanted.nodes if node.name not in options.node_names]
    return replace(
        options,
        remote=replace(
            remote,
            nodes=_with_keys(remote.nodes, wanted),
            standing_by=(
                *wanted.standing_by,
                *(
                    StandingBy(node.name, node.public_key, "the ring takes it in when all are here", noise=node.noise)
                    for node in new
                ),
            ),
            spares=(*wanted.spares, *new),
        ),
    )


def with_members_of(options: RingOptions, other: RingOptions) -> RingOptions:
    """Return a Ring with the keys of another one, and with those standing by that do so there and are not in it."""
    if options.remote is None or other.remote is None:
        return options
    names = options.node_names
    return replace(
        options,
        remote=replace(
            options.remote,
            nodes=_with_keys(options.remote.nodes, other.remote),
            standing_by=tuple(node for node in other.remote.standing_by if node.name not in names),
            spares=tuple(node for node in other.remote.spares if node.name not in names),
        ),
    )


def is_same_but_members(one: RingOptions, other: RingOptions) -> bool:
    """Tell whether two Rings differ in nothing but who may join: the Nodes that they go without, and keys."""
    return _without_members(one) == _without_members(other)


def rekeyed(old: RingOptions, new: RingOptions) -> list[str]:
    """Return the Nodes that have another key in the new Ring than in the old one, in it or standing by."""
    before = dict(members_of(old))
    return [name for name, key in members_of(new) if name in before and before[name] != key]


def members_of(options: RingOptions) -> set[tuple[str, str | None]]:
    """Return all Nodes that may connect, those that stand by too, with their keys."""
    idle = options.remote.standing_by if options.remote else ()
    return nodes_of(options) | {(node.name, node.public_key) for node in idle}


def nodes_of(options: RingOptions) -> set[tuple[str, str | None]]:
    """Return the Ring's Nodes with their keys."""
    return {(node.name, node.public_key) for node in options.remote.nodes} if options.remote else set()


def is_like(one: RingOptions, other: RingOptions) -> bool:
    """Tell whether two Rings differ in Layers, Nodes and keys alone, and reach each Node in the same way.

    Hops that both have are to be of the same format: they keep it, whatever else the Ring becomes.
    """
    old, new = one.remote, other.remote
    if old is None or new is None or old.nodes[0].public_key != new.nodes[0].public_key:
        return False
    known = {node.name: _as_reached(node) for node in (*old.nodes, *old.spares)}
    now = {node.name for node in old.nodes}
    wanted = (*new.nodes, *(node for node in new.spares if node.name in now))  # a spare may have taken over
    formats = dict(_formats(one))
    if any(formats.get(hop, wire) != wire for hop, wire in _formats(other)):
        return False
    is_same_node = all(known.get(node.name, _as_reached(node)) == _as_reached(node) for node in wanted)
    remote = replace(new, nodes=old.nodes, standing_by=old.standing_by, spares=old.spares)
    return is_same_node and replace(other, layers=one.layers, wires=one.wires, remote=remote) == one


def _formats(options: RingOptions) -> list[tuple[tuple[str, str], str]]:
    """Return each Hop, as its sender and its receiver, with the format that is wanted of it."""
    names = options.node_names
    hops = zip(names, (*names[1:], names[0]), strict=True)
    return list(zip(hops, options.wanted_wires, strict=False))  # one Node alone has no Hop


def _as_reached(node: RemoteNode) -> RemoteNode:
    """Return a Node without its key, and without what it may have of its machine."""
    return replace(node, public_key=None, memory_share=1.0, memory_bytes=None, keeps_standby_layers=True)


def _with_keys(nodes: Sequence[RemoteNode], other: RemoteRing) -> tuple[RemoteNode, ...]:
    """Return Nodes with the keys that they have in another Ring, or standing by there; the Starter keeps its own."""
    keys = {node.name: node.public_key for node in other.standing_by}
    keys |= {node.name: node.public_key for node in other.nodes}
    return (nodes[0], *(replace(node, public_key=keys.get(node.name, node.public_key)) for node in nodes[1:]))


def _taken_beside(
    ranges: Mapping[str, LayerRange], names: Sequence[str], able: Mapping[str, Able], end: int
) -> dict[str, LayerRange] | None:
    """Return the Layers of the Nodes that are left when those beside the lost ones take theirs; None without room."""
    taken = {name: ranges[name] for name in names}
    for left, right in zip(names, [*names[1:], None], strict=True):
        stop = taken[right].start if right else end
        if taken[left].stop == stop:
            continue
        cut = _cut(taken[left], able[left], taken[right] if right else None, able[right] if right else None, stop)
        if cut is None:
            return None
        taken[left] = LayerRange(taken[left].start, cut)
        if right is not None:
            taken[right] = LayerRange(cut, taken[right].stop)
    return taken


def _shared_anew(
    able: Sequence[Able], at_hand: Sequence[Collection[int]], num_first: int, max_s: float
) -> list[LayerRange] | None:
    """Return the Layers of Nodes with which the slowest takes as short as can be; None if it takes longer than max_s.

    at_hand: what each has, the first one all of them; num_first: how many the first one has at least.
    """
    num_layers = len(at_hand[0])
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # by Layers so far: the slowest Node, where each ends
    for i, (node, layers) in enumerate(zip(able, at_hand, strict=True)):
        before, best = best, {}
        for start, (slowest_s, stops) in before.items():
            for stop in range(start + 1, min(start + node.max_layers, num_layers) + 1):
                time_s = max(slowest_s, node.seconds(stop - start))
                if stop - 1 not in layers or time_s > max_s:
                    break
                if (i or stop >= num_first) and (stop not in best or time_s < best[stop][0]):
                    best[stop] = time_s, [*stops, stop]
    if num_layers not in best:
        return None
    return [LayerRange(start, stop) for start, stop in pairwise([0, *best[num_layers][1]])]


def _cut(left: LayerRange, left_able: Able, right: LayerRange | None, right_able: Able | None, stop: int) -> int | None:
    """Return where the Layers from ``left.stop`` to ``stop`` are cut between two Nodes; None if they do not fit."""
    if right is None or right_able is None:
        return stop if stop - left.start <= left_able.max_layers else None
    cuts = [
        cut
        for cut in range(left.stop, stop + 1)
        if cut - left.start <= left_able.max_layers and right.stop - cut <= right_able.max_layers
    ]
    slowest = {cut: max(left_able.seconds(cut - left.start), right_able.seconds(right.stop - cut)) for cut in cuts}
    return min(cuts, key=slowest.__getitem__, default=None)


def _replaced(options: RingOptions, name: str, spare: RemoteNode) -> RingOptions:
    remote = _remote(options)
    lost = next(node for node in remote.nodes if node.name == name)
    return replace(
        options,
        remote=replace(
            remote,
            nodes=tuple(spare if node is lost else node for node in remote.nodes),
            standing_by=(
                *(node for node in remote.standing_by if node.name != spare.name),
                _set_aside(lost, f"{spare.name} took over"),
            ),
            spares=(*(node for node in remote.spares if node is not spare), lost),
        ),
    )


def _without_members(options: RingOptions) -> RingOptions:
    if (remote := options.remote) is None:
        return options
    nodes = (remote.nodes[0], *(replace(node, public_key=None) for node in remote.nodes[1:]))
    return replace(options, remote=replace(remote, nodes=nodes, standing_by=(), spares=()))


def _set_aside(node: RemoteNode, how: str) -> StandingBy:
    return StandingBy(node.name, node.public_key, f"it was lost, and {how}", noise=node.noise)


def _remote(options: RingOptions) -> RemoteRing:
    assert options.remote is not None  # only such a Ring has Nodes that others can stand in for
    return options.remote
