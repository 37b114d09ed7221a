"""What a router counts, for its status and for Prometheus."""

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mdiq.route.servers import Server, State

_WAITS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
OUTCOMES = ("done", "refused", "broke", "left")
"""Of one request at one server: answered, refused by it, broken off, left by its client."""
FAILOVERS = ("again", "went_on", "in_vain")
"""Of one request: asked elsewhere before its client had anything of it, or after that, or given up."""


class Servers(Collector):
    """The servers as they are at a scrape."""

    def __init__(self, servers: Callable[[], Iterable[Server]]) -> None:
        self._servers = servers

    def collect(self) -> Iterator[Metric]:
        states = GaugeMetricFamily(
            "mdiq_route_server_state", "1 for the state of a server.", labels=["server", "state"]
        )
        running = GaugeMetricFamily("mdiq_route_server_running", "Prompts that a server has.", labels=["server"])
        drained = GaugeMetricFamily("mdiq_route_server_drained", "Whether a server is drained.", labels=["server"])
        free = GaugeMetricFamily(
            "mdiq_route_server_kv_free_tokens", "KV cache for new requests, in tokens.", labels=["server"]
        )
        for server in self._servers():
            for state in State:
                states.add_metric([server.name, state.value], server.state is state)
            running.add_metric([server.name], server.num_running)
            drained.add_metric([server.name], server.is_drained)
            if server.kv_free_tokens is not None:
                free.add_metric([server.name], server.kv_free_tokens)
        yield from (states, running, drained, free)


class RouteFigures:
    """The counters of one router."""

    def __init__(self, servers: Callable[[], Iterable[Server]]) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(Servers(servers))
        self.requests = Counter(
            "mdiq_route_requests_total", "Requests at servers.", ["server", "outcome"], registry=registry
        )
        self.failovers = Counter(
            "mdiq_route_failovers_total", "Requests that a server did not answer.", ["result"], registry=registry
        )
        self.refused = Counter(
            "mdiq_route_refused_total", "Requests that were not taken.", ["reason"], registry=registry
        )
        self.prefix_hits = Counter(
            "mdiq_route_prefix_hits_total", "Requests to a server that had their beginning.", registry=registry
        )
        self.first_s = Histogram(
            "mdiq_route_first_byte_seconds",
            "From a request to the first of its answer.",
            buckets=_WAITS_S,
            registry=registry,
        )
        for result in FAILOVERS:
            self.failovers.labels(result)

    def known(self, server: str) -> None:
        """Have a server's counters from the beginning: a rate needs their zeros."""
        for outcome in OUTCOMES:
            self.requests.labels(server, outcome)
