"""Errors and warnings about what a Topology promises of the activations that leave the Starter. Pure."""

from collections.abc import Iterator, Sequence

from mdiq.config.findings import OTHER_PLACE, Loc, Problem
from mdiq.config.topology import Node, Topology

LARGE_EPSILON = 10.0

_Numbered = Sequence[tuple[int, Node]]


def privacy_problems(topology: Topology) -> Iterator[Problem]:
    """Yield what is wrong between values."""
    nodes = list(enumerate(topology.nodes))
    yield from _trusted(topology, nodes)
    yield from _noise(nodes)


def privacy_warnings(topology: Topology) -> Iterator[Problem]:
    """Yield what noise costs, and does not do."""
    nodes = list(enumerate(topology.nodes))
    yield from _noisy(nodes)


def _at(index: int, key: str) -> Loc:
    return ("nodes", index, key)


def _trusted(topology: Topology, nodes: _Numbered) -> Iterator[Problem]:
    """Layers by hand against the Layers that are to stay on the Starter."""
    wanted = topology.ring.min_starter_layers
    for i, node in nodes:
        if node.is_starter and node.layers is not None and len(node.layers) < wanted:
            text = (
                f"{len(node.layers)} layers by hand, and ring.min_starter_layers ({OTHER_PLACE}) keeps {wanted} on "
                f"{node.name}; write 0-{wanted - 1} or more, or auto everywhere"
            )
            others = (("ring", "min_starter_layers"), _at(i, "name"), _at(i, "role"))
            yield Problem(_at(i, "layers"), text, others)


def _noise(nodes: _Numbered) -> Iterator[Problem]:
    for i, node in nodes:
        if node.is_starter and node.noise is not None:
            text = f"{node.name} is the Starter and knows every token; write noise at the workers that should not"
            yield Problem(_at(i, "noise"), text, (_at(i, "role"), _at(i, "name")))


def _noisy(nodes: _Numbered) -> Iterator[Problem]:
    workers = [(i, node) for i, node in nodes if not node.is_starter]
    noised = [(i, node) for i, node in workers if node.noise is not None]
    for i, _ in noised[:1]:
        text = (
            "noise changes answers: they differ from run to run, and from those of one node, whatever model.mode says"
        )
        yield Problem(_at(i, "noise"), f"{text}; see docs/privacy.md for what it costs")
    for i, node in noised:
        assert node.noise is not None
        if node.noise.epsilon > LARGE_EPSILON:
            text = (
                f"a larger epsilon than {LARGE_EPSILON:g} promises little, and answers may still suffer; see what it "
                "hides with `mdiq privacy`"
            )
            yield Problem((*_at(i, "noise"), "epsilon"), text)
    for i, node in workers if noised else ():
        if node.noise is None:
            text = (
                f"{node.name} has none, and {noised[0][1].name} ({OTHER_PLACE}) has; it sees rows without noise "
                f"{'when it takes over' if node.spare else 'where no node with noise comes before it'}; write noise "
                "here too, unless you trust it"
            )
            others = (_at(noised[0][0], "noise"), _at(i, "name"), _at(i, "role"), _at(i, "spare"))
            yield Problem(_at(i, "noise"), text, others)
