"""Rings on this machine that run as slowly as devices and their network do."""

from collections.abc import Mapping, Sequence

from mdiq.testbed.cpu_quota import CpuQuota
from mdiq.testbed.link_shape import LinkShape
from mdiq.testbed.relay import RelayProcess

_RELAYS_CPU = 1.0  # more than they take


class SlowRing:
    """Slows one Ring down; see runtime/options.py's Slowdown.

    link: what every Hop between processes is like; None leaves it as it is.
    cpu: CPU time of each Node in cores, or by its name, where control groups allow it; None sets no limit.
    comes_first: they get it before other processes of a busy machine do; and so does what makes the links slow.
    """

    def __init__(
        self,
        link: LinkShape | None = None,
        cpu: float | Mapping[str, float] | None = None,
        *,
        comes_first: bool = False,
    ) -> None:
        self._link, self._cpu, self._comes_first = link, cpu, comes_first
        self._quotas: dict[str, CpuQuota] = {}
        self._relays: RelayProcess | None = None

    async def slow_hops(self, endpoints: Sequence[str]) -> list[str]:
        """Return an endpoint for each of these, with a slow link between the two."""
        if self._link is None:
            return [*endpoints]
        self._relays = await RelayProcess.start(self._link, [*endpoints])
        if self._comes_first:
            self._limit("relays", self._relays.pid, _RELAYS_CPU)
        return self._relays.endpoints

    def slow_node(self, name: str, pid: int) -> None:
        """Limit the CPU time of a Node's process; one that is started again has the limit of the one before.

        Raises:
            ConfigError: this machine does not let this process do so.
        """
        cpu = self._cpu.get(name) if isinstance(self._cpu, Mapping) else self._cpu
        if cpu is not None:
            self._limit(name, pid, cpu)

    async def aclose(self) -> None:
        """Remove all of it; the processes have ended, but for this one."""
        if self._relays is not None:
            await self._relays.aclose()
        while self._quotas:
            self._quotas.popitem()[1].close()

    def _limit(self, name: str, pid: int, cpu: float) -> None:
        if name not in self._quotas:
            self._quotas[name] = CpuQuota.create(name, cpu, comes_first=self._comes_first)
        self._quotas[name].add(pid)
