import pytest

from mdiq.testbed import slow_ring
from mdiq.testbed.slow_ring import SlowRing


class FakeQuota:
    """Keeps books. As with a control group, there cannot be two of one name."""

    made: dict[str, "FakeQuota"] = {}

    def __init__(self) -> None:
        self.pids: list[int] = []

    @classmethod
    def create(cls, name: str, cpu: float, *, comes_first: bool) -> "FakeQuota":
        assert name not in cls.made, "the folder is there already"
        cls.made[name] = cls()
        return cls.made[name]

    def add(self, pid: int) -> None:
        self.pids.append(pid)

    def close(self) -> None:
        name = next(name for name, quota in self.made.items() if quota is self)
        del self.made[name]


async def test_a_node_that_is_started_again_has_the_limit_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slow_ring, "CpuQuota", FakeQuota)
    ring = SlowRing(cpu=0.5)
    ring.slow_node("node-0", 10)
    ring.slow_node("node-1", 11)
    ring.slow_node("node-1", 12)
    assert {name: quota.pids for name, quota in FakeQuota.made.items()} == {"node-0": [10], "node-1": [11, 12]}
    await ring.aclose()
    assert FakeQuota.made == {}


async def test_without_a_limit_no_group_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_ring, "CpuQuota", FakeQuota)
    ring = SlowRing()
    ring.slow_node("node-1", 11)
    assert FakeQuota.made == {}
    await ring.aclose()
