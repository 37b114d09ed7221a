import pytest

from mdiq.errors import ConfigError
from mdiq.testbed.link_shape import DelayLine, LinkShape, parse_link


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("delay=20ms,bandwidth=10mbit,jitter=5ms", LinkShape(0.02, 0.005, 1e7)),
        ("bandwidth=1.5gbit", LinkShape(0.0, 0.0, 1.5e9)),
        ("delay=500us", LinkShape(0.0005)),
        (" delay = 1s , jitter=1S", LinkShape(1.0, 1.0)),
        ("delay=0ms", LinkShape()),
        ("bandwidth=10kbit", LinkShape(bandwidth_bit_per_s=1e4)),
        ("bandwidth=20000bit", LinkShape(bandwidth_bit_per_s=2e4)),
    ],
)
def test_a_link_is_read(text: str, shape: LinkShape) -> None:
    assert parse_link(text.replace(" = ", "=")) == shape


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is not delay, bandwidth or jitter"),
        ("loss=1", "'loss' is not delay, bandwidth or jitter"),
        ("delay=20", "delay must be a number with one of the units us, ms, s"),
        ("delay=-1ms", "delay must be a number"),
        ("delay=20mbit", "delay must be a number"),
        ("bandwidth=10ms", "bandwidth must be a number with one of the units bit, kbit, mbit, gbit"),
        ("bandwidth=1kbit", "bandwidth must be 10kbit or more"),
        ("bandwidth=0mbit", "bandwidth must be 10kbit or more"),
        ("delay=1ms,delay=2ms", "delay stands there twice"),
        ("delay=11s", "delay is more than 10 s"),
        ("delay=1ms,jitter=2ms", "jitter is more than delay"),
    ],
)
def test_what_is_no_link_says_why_and_gives_an_example(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_link(text)
    assert reason in str(caught.value)
    assert str(caught.value).endswith("write for example delay=20ms,bandwidth=10mbit,jitter=5ms")


@pytest.mark.parametrize(
    "text", ["delay=20ms,bandwidth=10mbit,jitter=5ms", "delay=0.5ms", "delay=0ms,bandwidth=0.02mbit"]
)
def test_a_link_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_link(text)) == text


def test_a_piece_comes_out_after_the_delay() -> None:
    line = DelayLine(LinkShape(delay_s=0.5))
    assert line.release_s(1000, 1.0, 0.0) == 1.5
    assert line.release_s(1000, 3.0, 0.0) == 3.5


def test_a_piece_occupies_the_link_for_its_bits() -> None:
    line = DelayLine(LinkShape(delay_s=0.5, bandwidth_bit_per_s=8000.0))
    assert line.release_s(1000, 0.0, 0.0) == 1.5
    assert line.release_s(500, 0.0, 0.0) == 2.0  # it waits for the first one
    assert line.release_s(1000, 10.0, 0.0) == 11.5  # the link was free again


def test_a_busy_link_carries_its_bandwidth_and_no_more() -> None:
    line = DelayLine(LinkShape(delay_s=0.25, bandwidth_bit_per_s=1e6))
    assert [line.release_s(12_500, 0.0, 0.0) for _ in range(100)][-1] == pytest.approx(100 * 0.1 + 0.25)


def test_jitter_moves_a_piece_but_never_before_an_earlier_one() -> None:
    line = DelayLine(LinkShape(delay_s=1.0, jitter_s=0.5))
    assert line.release_s(1, 0.0, 1.0) == 1.5
    assert line.release_s(1, 0.1, -1.0) == 1.5
    assert line.release_s(1, 2.0, -1.0) == 2.5
