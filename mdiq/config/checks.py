"""Errors and warnings about values of a Topology that do not fit together, each with its place. Pure."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from mdiq.config.addresses import is_loopback, is_wildcard, machine_of
from mdiq.config.findings import OTHER_PLACE, Loc, Problem
from mdiq.config.privacy_checks import privacy_problems, privacy_warnings
from mdiq.config.topology import Listening, Node, Topology
from mdiq.config.units import shown, size_text
from mdiq.core.wire_formats import AUTO, SMALL, USUAL, rounds

SMALL_MEMORY_BYTES = 512 << 20
MANY_THREADS = 64
SLOW_TRANSFER_BIT_PER_S = 2e6
SHORT_WAIT_S = 0.02

_Numbered = Sequence[tuple[int, Node]]


def find_problems(topology: Topology, *, without_keys: bool = False) -> list[Problem]:
    """Return everything that is wrong between values. without_keys: keys are yet to be made."""
    nodes = list(enumerate(topology.nodes))
    return [
        *_roles(nodes),
        *_names(nodes),
        *_addresses(nodes),
        *_ports(topology, nodes),
        *_layers(nodes),
        *privacy_problems(topology),
        *_hops(topology),
        *_keys(topology, nodes, without_keys),
        *_api(topology),
    ]


def find_warnings(topology: Topology) -> list[Problem]:
    """Return what is allowed and will hurt."""
    nodes = list(enumerate(topology.nodes))
    return [
        *_plain_text(topology),
        *_narrow(topology, nodes),
        *_shared_machines(nodes),
        *_slow(topology),
        *privacy_warnings(topology),
        *_open_api(topology),
    ]


def _at(index: int, key: str = "") -> Loc:
    return ("nodes", index, key) if key else ("nodes", index)


def _roles(nodes: _Numbered) -> Iterator[Problem]:
    starters = [(i, node) for i, node in nodes if node.is_starter]
    if not starters:
        others = tuple(_at(i, "role") for i, _ in nodes)
        yield Problem(("nodes",), "no node is the Starter; write role: starter at the one that has the model", others)
    for i, node in starters[1:]:
        first, starter = starters[0]
        text = f"{starter.name} ({OTHER_PLACE}) is the Starter already; remove this line, and {node.name} is a worker"
        yield Problem(_at(i, "role"), text, (_at(first, "role"), _at(first, "name"), _at(i, "name")))
    for i, node in starters[:1]:
        if node.spare:
            text = f"{node.name} is the Starter and cannot be spare; write false, or make another node the Starter"
            yield Problem(_at(i, "spare"), text, (_at(i, "role"), _at(i, "name")))
        if i:
            text = f"{node.name} is the Starter, where the ring begins; move it to the top of nodes"
            yield Problem(_at(i), text, (_at(i, "role"), _at(i, "name")))
    for i, node in nodes:
        if node.is_starter:
            continue
        for key in ("control_port", "weights_port"):
            if key in node.model_fields_set:
                text = f"{node.name} is a worker, and only the Starter has this port; remove the line"
                yield Problem(_at(i, key), text, (_at(i, "role"), _at(i, "name")))


def _names(nodes: _Numbered) -> Iterator[Problem]:
    first_of: dict[str, int] = {}
    for i, node in nodes:
        first = first_of.setdefault(node.name, i)
        if first != i:
            text = f"{node.name} is the name of another node ({OTHER_PLACE}) too; give one of them another name"
            yield Problem(_at(i, "name"), text, (_at(first, "name"),))


def _addresses(nodes: _Numbered) -> Iterator[Problem]:
    outside = [i for i, node in nodes if not is_loopback(node.address)]
    for i, node in nodes:
        if outside and is_loopback(node.address):
            text = (
                f"{node.address} means {node.name} to {node.name} alone, and other devices ({OTHER_PLACE}) cannot call "
                f"it; write its address in the network"
            )
            yield Problem(_at(i, "address"), text, (_at(outside[0], "address"), _at(i, "name")))


def _ports(topology: Topology, nodes: _Numbered) -> Iterator[Problem]:
    starters = [(i, node) for i, node in nodes if node.is_starter][:1]  # a second one is a Problem of its own
    claims: list[tuple[str, int, Loc, tuple[Loc, ...], str]] = []
    others: tuple[Loc, ...]
    for i, node in nodes:
        for key in ("data_port", "control_port", "weights_port")[: 3 if (i, node) in starters else 1]:
            others = (_at(i, "address"), _at(i, "name"), _at(i, "role"))
            claims.append((machine_of(node.address), getattr(node, key), _at(i, key), others, f"{node.name}'s {key}"))
    for i, node in starters:
        # The API listens on the Starter's machine, on whatever address: the port is to be one of its own there.
        others = (_at(i, "address"), _at(i, "role"))
        claims.append((machine_of(node.address), topology.api.port, ("api", "port"), others, "the API's port"))
    taken = {(machine, port) for machine, port, *_ in claims}
    first_of: dict[tuple[str, int], tuple[Loc, tuple[Loc, ...], str]] = {}
    for machine, port, loc, others, owner in claims:
        first, first_others, first_owner = first_of.setdefault((machine, port), (loc, others, owner))
        if first != loc:
            free = next(n for n in range(port + 1, 1 << 17) if (machine, n) not in taken)
            advice = f"write another port, for example {free}" if free <= 65535 else "write another port"
            text = f"port {port} at {machine} is {first_owner} ({OTHER_PLACE}) already; {advice}"
            yield Problem(loc, text, (first, *first_others, *others))


def _layers(nodes: _Numbered) -> Iterator[Problem]:
    for i, node in nodes:
        if node.spare and node.layers is not None:
            text = f"{node.name} is spare and takes the layers of the node that fails; remove this line"
            yield Problem(_at(i, "layers"), text, (_at(i, "spare"), _at(i, "name")))
    ring = [(i, node) for i, node in nodes if not node.spare]
    by_hand = [(i, node) for i, node in ring if node.layers is not None]
    if not by_hand:
        return
    stop, before = 0, ""
    everywhere = tuple(_at(i, key) for i, _ in ring for key in ("layers", "spare"))
    for i, node in ring:
        if node.layers is None:
            text = (
                f"{node.name} has none, and other nodes ({OTHER_PLACE}) have layers by hand; write {node.name}'s, "
                f"or auto everywhere"
            )
            yield Problem(_at(i, "layers"), text, (_at(by_hand[0][0], "layers"), _at(i, "name"), _at(i, "spare")))
    if len(by_hand) < len(ring):
        return
    last = 0
    for i, node in by_hand:
        layers = node.layers
        assert layers is not None
        if layers.start != stop:
            want = f"{stop}-{stop + len(layers) - 1}"
            if not before:
                text = f"{layers} begins at layer {layers.start}, and the ring at 0; write {want}, or auto everywhere"
            elif layers.start < stop:
                text = f"{layers} overlaps {before} ({OTHER_PLACE}); write {want}, or auto everywhere"
            else:
                gap = f"{stop}-{layers.start - 1}" if layers.start - 1 > stop else str(stop)
                text = (
                    f"{layers} leaves out {gap} after {before} ({OTHER_PLACE}); write {stop}-{layers.stop - 1}, "
                    f"or auto everywhere"
                )
            yield Problem(_at(i, "layers"), text, (_at(last, "layers"), *everywhere))
        stop, before, last = layers.stop, f"{node.name}'s {layers}", i


def _hops(topology: Topology) -> Iterator[Problem]:
    numbers = {node.name: i for i, node in enumerate(topology.nodes)}
    next_of = dict(topology.hops)
    ring = [sender for sender, _ in topology.hops]
    first_of: dict[tuple[str, str], int] = {}
    for i, hop in enumerate(topology.links.hops):
        place: Loc = ("links", "hops", i)
        ends = (("from", hop.sender), ("to", hop.receiver))
        keys = tuple((*place, key) for key, _ in ends)
        unknown = [(key, name) for key, name in ends if name not in numbers]
        for key, name in unknown:
            close = get_close_matches(name, numbers, n=1)
            advice = f"did you mean {close[0]}?" if close else f"the nodes are {_list(list(numbers))}"
            names = tuple(_at(n, "name") for n in numbers.values())
            yield Problem((*place, key), f"no node is named {shown(name)}; {advice}", names)
        if unknown:
            continue
        at_nodes = tuple(_at(n, key) for n in numbers.values() for key in ("name", "spare", "role"))
        spare = [(key, name) for key, name in ends if topology.node(name).spare]
        if spare:
            key, name = spare[0]
            text = (
                f"{name} is spare ({OTHER_PLACE}), and its neighbours are known only when it steps in; remove this "
                f"hop, and links.wire holds for it"
            )
            yield Problem((*place, key), text, (_at(numbers[name]), *at_nodes))
        elif next_of[hop.sender] != hop.receiver or hop.sender == hop.receiver:
            if len(ring) == 1:
                text = "one node alone has no hops; remove it"
            else:
                text = (
                    f"{hop.receiver} does not follow {hop.sender} in the ring; write {next_of[hop.sender]}: the ring "
                    f"is {_circle(ring)}"
                )
            yield Problem((*place, "to"), text, (*keys, *at_nodes))
        elif (hop.sender, hop.receiver) in first_of:
            first = first_of[hop.sender, hop.receiver]
            text = f"the hop from {hop.sender} to {hop.receiver} stands there twice ({OTHER_PLACE}); remove one"
            yield Problem(place, text, (("links", "hops", first), *keys))
        first_of.setdefault((hop.sender, hop.receiver), i)


def _keys(topology: Topology, nodes: _Numbered, without_keys: bool) -> Iterator[Problem]:
    first_of: dict[str, int] = {}
    for i, node in nodes:
        if node.public_key is None:
            continue
        first = first_of.setdefault(node.public_key, i)
        if first != i:
            text = (
                f"{topology.nodes[first].name} ({OTHER_PLACE}) has the same key, and each node needs its own; "
                f"remove this line and run `mdiq keys`"
            )
            yield Problem(_at(i, "public_key"), text, (_at(first, "public_key"), _at(first, "name")))
    missing = [(i, node) for i, node in nodes if node.public_key is None]
    if topology.security.insecure or without_keys or not missing:
        return
    keyed = [i for i, node in nodes if node.public_key is not None]
    insecure: Loc = ("security", "insecure")
    if keyed:
        for i, node in missing:
            text = (
                f"{node.name} has no public_key, and others ({OTHER_PLACE}) have; run `mdiq keys`, which makes those "
                f"that are missing"
            )
            yield Problem(_at(i, "public_key"), text, (_at(keyed[0], "public_key"), _at(i, "name"), insecure))
    elif outside := [i for i, node in nodes if not is_loopback(node.address)]:
        text = (
            f"no node has a public_key, and {topology.nodes[outside[0]].name} ({OTHER_PLACE}) is beyond loopback; run "
            f"`mdiq keys`, or write security: {{insecure: true}} if all in that network may read and forge everything"
        )
        others = (
            _at(outside[0], "address"),
            _at(outside[0], "name"),
            insecure,
            *(_at(i, "public_key") for i, _ in nodes),
        )
        yield Problem(("nodes",), text, others)


def _api(topology: Topology) -> Iterator[Problem]:
    yield from listening_problems(topology.api)


def listening_problems(api: Listening) -> Iterator[Problem]:
    """Yield what is wrong between the values of an HTTP API's section."""
    if not is_loopback(api.host) and api.keys_file is None:
        text = (
            f"{api.host} lets other machines ask, and there are no API keys; give a file of keys by "
            f"api.keys_file, or by --keys-file without a topology (`mdiq api-key` makes one), or write 127.0.0.1"
        )
        yield Problem(("api", "host"), text, (("api", "keys_file"),))
    if (api.tls_cert is None) != (api.tls_key is None):
        given, missing = ("tls_cert", "tls_key") if api.tls_key is None else ("tls_key", "tls_cert")
        text = f"HTTPS needs both; write {missing}: too, or remove it"
        yield Problem(("api", given), text, (("api", missing),))


def _plain_text(topology: Topology) -> Iterator[Problem]:
    if not topology.security.insecure:
        return
    place: Loc = ("security", "insecure")
    keyed = [i for i, node in enumerate(topology.nodes) if node.public_key is not None]
    if not topology.is_on_loopback:
        outside = next(node for node in topology.nodes if not is_loopback(node.address))
        text = (
            f"prompts, answers and weights pass in plain text to {outside.name} ({outside.address}), and whoever is in "
            f"that network can read and forge them; remove it and run `mdiq keys`"
        )
        yield Problem(place, text)
    if keyed:
        text = f"the public keys ({OTHER_PLACE}) are not used as long as it is true; remove it to encrypt"
        yield Problem(place, text, (_at(keyed[0], "public_key"),))


def _narrow(topology: Topology, nodes: _Numbered) -> Iterator[Problem]:
    if len(topology.ring_nodes) == 1:
        others = tuple(_at(i, "spare") for i, _ in nodes)
        yield Problem(("nodes",), "one node alone holds the whole model; add a node to share it", others)
    for i, node in nodes:
        if node.memory_bytes is not None and node.memory_bytes < SMALL_MEMORY_BYTES:
            text = (
                f"{size_text(node.memory_bytes)} leaves little for layers, since mdiq and torch take about 300M; "
                f"write {size_text(SMALL_MEMORY_BYTES)} or more if the device has it"
            )
            yield Problem(_at(i, "memory"), text)
        if node.threads is not None and node.threads > MANY_THREADS:
            text = f"{node.threads} threads slow a device down that has fewer cores; write auto if in doubt"
            yield Problem(_at(i, "threads"), text)


def _shared_machines(nodes: _Numbered) -> Iterator[Problem]:
    on_machine: dict[str, list[int]] = {}
    for i, node in nodes:
        on_machine.setdefault(machine_of(node.address), []).append(i)
    for machine, together in on_machine.items():
        for key, attribute, what in (("threads", "threads", "cores"), ("memory", "memory_bytes", "memory")):
            unset = [i for i in together if getattr(nodes[i][1], attribute) is None]
            if len(together) > 1 and len(unset) > 1:
                node = nodes[unset[1]][1]
                text = (
                    f"{node.name} and {nodes[unset[0]][1].name} ({OTHER_PLACE}) share {machine}, and auto gives each "
                    f"all of its {what}; write {key} at each of them"
                )
                others = tuple(_at(i, name) for i in unset[:2] for name in ("address", "name", key))
                yield Problem(_at(unset[1], key), text, (_at(unset[0]), *others))


def _slow(topology: Topology) -> Iterator[Problem]:
    links = topology.links
    places: list[tuple[Loc, str]] = [(("links", "wire"), links.wire)]
    places += [(("links", "hops", i, "wire"), hop.wire) for i, hop in enumerate(links.hops)]
    model = topology.model
    if len(topology.ring_nodes) > 1:
        for loc, wire in places:
            if model.mode == "exact" and wire != AUTO and rounds(wire, model.dtype):
                text = f"{wire} rounds activations at each cut between nodes, so these give other tokens than one node"
                yield Problem(loc, f"{text}; write auto, or mode: fast")
            elif model.mode == "fast" and wire != AUTO and rounds(USUAL, wire) and not topology.is_on_loopback:
                yield Problem(
                    loc,
                    f"{wire} sends twice the bytes of {USUAL} and four times those of {SMALL}; write auto, or {USUAL}",
                )
    limit = links.transfer_limit_bit_per_s
    if limit is not None and limit < SLOW_TRANSFER_BIT_PER_S:
        text = f"1G of weights then takes {(8 << 30) / limit / 3600:.1f} hours; write more if the network allows it"
        yield Problem(("links", "transfer_limit"), text)
    if topology.ring.decode_wait_s < SHORT_WAIT_S:
        text = "one short piece of a prompt takes longer on small devices, so it will not be kept; write 100ms or more"
        yield Problem(("ring", "decode_wait"), text)


def _open_api(topology: Topology) -> Iterator[Problem]:
    host = topology.api.host
    if not is_loopback(host) and topology.api.tls_cert is None:
        where = "every address of the machine" if is_wildcard(host) else host
        text = (
            f"HTTP on {where} is not encrypted: API keys and prompts pass in plain text; set tls_cert and tls_key, or "
            f"put a proxy with TLS in front"
        )
        yield Problem(("api", "host"), text)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _circle(ring: Sequence[str]) -> str:
    return " > ".join([*ring, ring[0]]) if len(ring) <= 8 else "in the order of nodes"
