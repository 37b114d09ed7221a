"""Leases and states of Nodes."""

import pytest

from mdiq.core.membership import Membership, NodeState
from mdiq.core.types import NodeId
from mdiq.errors import RemoteProtocolError

NODE = NodeId("node-1")


def test_a_node_joins_loads_serves_and_loads_again() -> None:
    members = Membership(lease_s=10, silence_s=4)
    members.joined(NODE, now=0.0)
    members.assigned(NODE)
    members.ready(NODE)
    assert members.state(NODE) is NodeState.READY
    members.assigned(NODE)
    assert members.state(NODE) is NodeState.LOADING


def test_a_node_that_serves_may_be_silent_for_less_long_than_one_that_starts() -> None:
    members = Membership(lease_s=10, silence_s=4)
    members.joined(NODE, now=0.0)
    with pytest.raises(RemoteProtocolError, match="'begun' while joining"):
        members.begun(NODE)
    members.assigned(NODE)
    members.ready(NODE)
    assert members.lease_s(NODE) == 10 and members.expire(now=9.0) == []
    members.heard(NODE, now=9.0)
    members.begun(NODE)
    members.begun(NODE)  # the next Epoch
    assert members.state(NODE) is NodeState.SERVING and members.lease_s(NODE) == 4
    assert members.expire(now=12.9) == [] and members.expire(now=13.0) == [(NODE, 4)]


def test_a_heartbeat_renews_a_lease_and_silence_ends_it_once() -> None:
    members = Membership(lease_s=10, silence_s=4)
    members.joined(NODE, now=0.0)
    members.heard(NODE, now=5.0)
    assert members.expire(now=14.9) == []
    assert members.expire(now=15.0) == [(NODE, 10)]
    assert members.expire(now=16.0) == []
    members.heard(NODE, now=17.0)
    assert members.state(NODE) is NodeState.LOST


def test_the_watchers_own_lateness_is_no_silence_of_the_nodes() -> None:
    members = Membership(lease_s=10, silence_s=4)
    members.joined(NODE, now=0.0)
    members.stretch(70.0, now=72.0)
    assert members.silent_s(NODE, now=75.0) == 5.0
    assert members.expire(now=79.0) == [] and members.expire(now=80.0) == [(NODE, 10)]


def test_a_node_that_is_heard_as_soon_as_the_watcher_goes_on_has_no_more_than_a_whole_lease() -> None:
    members = Membership(lease_s=10, silence_s=4)
    members.joined(NODE, now=0.0)
    members.heard(NODE, now=3_600.5)  # a message that had waited, read before the watcher looks
    members.stretch(3_600.0, now=3_601.0)
    assert members.silent_s(NODE, now=3_603.0) == 2.0
    assert members.expire(now=3_610.9) == [] and members.expire(now=3_611.0) == [(NODE, 10)]


def test_a_lost_node_may_join_again_and_a_live_one_may_not() -> None:
    members = Membership(lease_s=10, silence_s=4)
    members.joined(NODE, now=0.0)
    with pytest.raises(RemoteProtocolError, match="out of order"):
        members.joined(NODE, now=1.0)
    members.lost(NODE)
    members.joined(NODE, now=2.0)
    assert members.state(NODE) is NodeState.JOINING


def test_what_comes_out_of_order_or_from_a_stranger_is_refused() -> None:
    members = Membership(lease_s=10, silence_s=4)
    members.heard(NODE, now=0.0)
    assert members.state(NODE) is None
    with pytest.raises(RemoteProtocolError, match="unknown"):
        members.ready(NODE)
    members.joined(NODE, now=0.0)
    with pytest.raises(RemoteProtocolError, match="joining"):
        members.ready(NODE)


def test_silence_counts_from_the_last_heartbeat() -> None:
    members = Membership(lease_s=10, silence_s=4)
    assert members.silent_s(NODE, now=5.0) == 0.0
    members.joined(NODE, now=0.0)
    members.heard(NODE, now=5.0)
    assert members.silent_s(NODE, now=7.5) == 2.5
