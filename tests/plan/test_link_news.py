"""When the Hops of a serving Ring are measured again, and what of it is worth a change."""

import pytest

from mdiq.core.hop_survey import HopLink
from mdiq.core.types import NodeId
from mdiq.plan.drift import GAIN
from mdiq.plan.link_news import AGAIN_S, CHANGED, EVERY_S, MIN_CHANGE_S, STEADY, LinkNews
from mdiq.plan.measured import Profiles
from mdiq.plan.profile import HopProfile, Links
from tests.plan.profiles import MODEL, node


def test_links_are_measured_every_few_minutes() -> None:
    news = LinkNews()
    assert not news.is_due(100.0, 0.01)
    assert not news.is_due(100.0 + EVERY_S - 1, 0.01)
    assert news.is_due(100.0 + EVERY_S, 0.01)
    assert not news.measured(100.0 + EVERY_S, 0.01, 1.0)
    assert not news.is_due(100.0 + 2 * EVERY_S - 1, 0.01)
    assert news.is_due(100.0 + 2 * EVERY_S, 0.01)


@pytest.mark.parametrize(
    ("hops_s", "is_due"),
    [(0.01 * CHANGED, True), (0.01 / CHANGED, True), (0.0149, False), (0.0067, False), (None, False)],
)
def test_they_are_measured_sooner_if_probes_take_longer_or_less_long(hops_s: float | None, is_due: bool) -> None:
    news = LinkNews()
    news.is_due(0.0, 0.01)
    assert not news.is_due(AGAIN_S - 1, hops_s)
    assert news.is_due(AGAIN_S, hops_s) == is_due
    news.measured(AGAIN_S, hops_s, 1.0)
    assert not news.is_due(2 * AGAIN_S, hops_s), "that is known now"


def test_a_change_of_less_than_matters_is_none() -> None:
    news = LinkNews()
    news.is_due(0.0, MIN_CHANGE_S / 4)
    assert not news.is_due(AGAIN_S, MIN_CHANGE_S)


def test_probes_that_come_later_than_the_first_look_are_no_change() -> None:
    news = LinkNews()
    news.is_due(0.0, None)
    assert not news.is_due(AGAIN_S, 0.5)
    assert news.is_due(AGAIN_S, 1.0)


def test_a_gain_counts_when_it_is_there_again_and_again() -> None:
    news, now, found = LinkNews(), EVERY_S, []
    news.is_due(0.0, 0.01)
    gains = [*[GAIN] * (STEADY - 1), None, *[GAIN] * (STEADY - 1), GAIN - 0.01, *[GAIN] * STEADY]
    for gain in gains:
        assert news.is_due(now, 0.01) and not news.is_due(now - 1, 0.01)
        found.append(news.measured(now, 0.01, gain))
        now += AGAIN_S if gain == GAIN else EVERY_S
    assert found == [False] * (len(gains) - 1) + [True]


def test_what_was_given_up_is_tried_again_after_a_while() -> None:
    news = LinkNews()
    news.is_due(0.0, 0.01)
    assert news.is_due(EVERY_S, 0.01)
    news.given_up(EVERY_S)
    assert not news.is_due(EVERY_S + AGAIN_S - 1, 0.01)
    assert news.is_due(EVERY_S + AGAIN_S, 0.01)


def test_profiles_have_the_hops_that_were_measured_now_and_keep_the_others() -> None:
    a, b, c = map(NodeId, "abc")
    before = {(a, b): HopProfile(0.1, 1e6, 64), (b, c): HopProfile(0.2, 2e6), (c, a): HopProfile(0.3, 3e6)}
    profiles = Profiles(MODEL, {name: node(name) for name in "abc"}, Links(before))
    seen = profiles.with_hops(["a", "b"], [HopLink(0.01, 5e6), HopLink(0.02, 6e6)])
    assert seen.links.hops == before | {(a, b): HopProfile(0.01, 5e6, 64), (b, a): HopProfile(0.02, 6e6)}
    assert profiles.with_hops(["a", "b", "c"], [None] * 3) == profiles
    assert seen.nodes == profiles.nodes and seen.links.between(b, a).delay_s == 0.02
