"""Which server a request goes to. Pure.

Of the servers that take requests for its model, and have room for it in their KV cache, a request goes to the one that
has computed most of its beginning, unless that has much more to do than the others; else to the one with the least to
do for each place.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from mdiq.route.servers import Server, State

SLACK = 0.5
"""How much more load a server may have, in requests for each of its places, and still get what it has computed."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request needs.

    model: None: there is one model only. num_tokens: of its prompt, roughly; block_tokens: of each of its blocks.
    blocks: of its beginning that each server has computed. same_tokens: the server must give the same tokens as
    another; min_context_tokens: and hold as much. only: it must be one of these, which may be drained: they have what
    it goes on from; None: any.
    """

    model: str | None = None
    num_tokens: int = 0
    block_tokens: int = 0
    blocks: Mapping[str, int] = field(default_factory=dict)
    same_tokens: str | None = None
    min_context_tokens: int = 0
    only: frozenset[str] | None = None


def choose(servers: Iterable[Server], wanted: Wanted, tried: Collection[str] = ()) -> Server | None:
    """Return the best server that was not tried, or None."""
    usable = [each for each in servers if each.name not in tried and _suits(each, wanted)]
    usable = [each for each in usable if each.has_room] or usable  # one without room may have some by now
    usable = [each for each in usable if _has_cache(each, wanted)] or usable  # it waits there, as it would elsewhere
    if not usable:
        return None
    lowest = min(each.load for each in usable)
    near = [each for each in usable if wanted.blocks.get(each.name) and each.load <= lowest + SLACK]
    if near:
        return max(near, key=lambda each: (wanted.blocks[each.name], -each.load))
    return min(usable, key=lambda each: (each.load, each.had, each.name))


def _has_cache(server: Server, wanted: Wanted) -> bool:
    free = server.kv_free_tokens
    return free is None or wanted.num_tokens - wanted.blocks.get(server.name, 0) * wanted.block_tokens <= free


def _suits(server: Server, wanted: Wanted) -> bool:
    report = server.report
    takes_it = server.takes_requests if wanted.only is None else server.state is State.SERVES
    if report is None or not takes_it or (wanted.only is not None and server.name not in wanted.only):
        return False
    return (
        wanted.model in (None, report.model)
        and report.context_tokens >= wanted.min_context_tokens
        and (wanted.same_tokens is None or report.same_tokens == wanted.same_tokens)
    )


def models_of(servers: Iterable[Server]) -> dict[str, int]:
    """Return the models that are served or were, and the largest context of each."""
    found: dict[str, int] = {}
    for server in servers:
        if (report := server.report) is not None:
            found[report.model] = max(found.get(report.model, 0), report.context_tokens)
    return found
