"""Sizes, rates, times, layers and addresses: what is read, and what a refusal says to write."""

from collections.abc import Callable

import pytest

from mdiq.config import units
from mdiq.config.addresses import checked_address, is_loopback, is_wildcard, machine_of
from mdiq.core.types import LayerRange


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.parse_size, "700M", 700 << 20),
        (units.parse_size, "1.5G", 3 << 29),
        (units.parse_size, "64K", 1 << 16),
        (units.parse_size, "2T", 2 << 40),
        (units.parse_rate, "20mbit", 2e7),
        (units.parse_rate, "1.5gbit", 1.5e9),
        (units.parse_rate, "64kbit", 64e3),
        (units.parse_time, "200ms", 0.2),
        (units.parse_time, "500us", 0.0005),
        (units.parse_time, "5s", 5.0),
        (units.parse_time, "1min", 60.0),
        (units.parse_layers, "0-11", LayerRange(0, 12)),
        (units.parse_layers, "5-5", LayerRange(5, 6)),
    ],
)
def test_a_text_with_a_unit_is_a_number(parse: Callable[[object], object], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "advice"),
    [
        (units.parse_size, 700, "700 has no unit; write for example 700M"),
        (units.parse_size, "1.5", "1.5 has no unit; write for example 1.5M"),
        (units.parse_size, "2GiB", "write 2G (powers of 1024)"),
        (units.parse_size, "2gb", "write 2G (powers of 1024)"),
        (units.parse_size, "2X", "use one of K, M, G, T"),
        (units.parse_size, " 2G", "write 2G"),
        (units.parse_size, "-2G", "write a number with its unit"),
        (units.parse_size, "0G", "write more than that"),
        (units.parse_size, True, "true is not a size"),
        (units.parse_size, ["2G"], "a list is not a size"),
        (units.parse_size, None, "nothing is not a size"),
        (units.parse_rate, "20MB/s", "write 160mbit"),
        (units.parse_rate, "20Mbps", "write 20mbit"),
        (units.parse_rate, "20Mb/s", "write 20mbit"),
        (units.parse_rate, "20Mbit", "write 20mbit"),
        (units.parse_rate, "20Mbit/s", "write 20mbit"),
        (units.parse_rate, "20M", "use one of kbit, mbit, gbit"),
        (units.parse_rate, 20, "20 has no unit; write for example 20mbit"),
        (units.parse_time, "200MS", "write 200ms"),
        (units.parse_time, "200 ms", "write 200ms"),
        (units.parse_time, "200sec", "use one of us, ms, s, min"),
        (units.parse_time, 200, "write for example 200ms"),
        (lambda value: units.parse_time(value, "5s"), 7, "write for example 7s"),
        (units.parse_layers, 5, "5-5 is layer 5 alone, 0-4 are 5 layers"),
        (units.parse_layers, 0, "0-0 is layer 0 alone"),
        (units.parse_layers, "0..11", "write 0-11"),
        (units.parse_layers, "0 - 11", "write 0-11"),
        (units.parse_layers, (0, 11), "write the first and the last layer as 0-11"),
        (units.parse_layers, "11-0", "write the first layer first: 0-11"),
        (units.parse_layers, "all", "for example 0-11, or auto"),
    ],
)
def test_another_text_is_refused_with_what_to_write(
    parse: Callable[[object], object], text: object, advice: str
) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert advice in str(caught.value)


def test_a_size_is_written_as_it_is_read() -> None:
    assert [units.size_text(n) for n in (700 << 20, 3 << 29, 1 << 16, 100, 2 << 40)] == [
        "700M",
        "1.5G",
        "64K",
        "0.0977K",
        "2T",
    ]


def test_a_message_repeats_nothing_long_and_nothing_that_a_terminal_obeys() -> None:
    assert units.shown("\x1b[2Jx") == "?[2Jx"
    assert units.shown("a" * 100) == "a" * 40 + "..."


@pytest.mark.parametrize(
    "text", ["192.168.1.10", "fd00::10", "::1", "pi1", "pi1.lan", "Desk-2.office.lan.", "my_host", "127.0.0.1"]
)
def test_an_address_or_a_name_is_let_through(text: str) -> None:
    assert checked_address(text, may_be_wildcard=False) == text


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("", "it is empty"),
        ("tcp://pi1:7400", "write the address alone: pi1"),
        ("tcp://[fd00::1]:7400", "write the address alone: fd00::1"),
        ("http://fd00::1/", "write the address alone: fd00::1"),
        ("pi1:7400", "write the address alone, pi1, and 7400 as the port's own key"),
        ("[fd00::1]:7400", 'write the IPv6 address in quotes alone: "fd00::1"'),
        ("192.168.1.0/24", "write the device's own address: 192.168.1.0"),
        ("fe80::1%eth0", "write an address that all devices can use"),
        ("0.0.0.0", "write the device's own"),
        ("::", "write the device's own"),
        ("224.0.0.1", "belongs to no single device"),
        ("255.255.255.255", "belongs to no single device"),
        ("192.168.1.256", "256 is more than 255"),
        ("192.168.1", "which has 4 numbers"),
        ("192.168.1.", "which has 4 numbers"),
        ("010.0.0.1", "write 10.0.0.1"),
        ("fd00::zz", "is not an IPv6 address"),
        ("pi1,pi2", "neither an IP address nor a host name"),
        ("-pi", "neither an IP address nor a host name"),
        ("a" * 64, "neither an IP address nor a host name"),
        ("*", "neither an IP address nor a host name"),
        ("pi 1", "has a space in it"),
    ],
)
def test_what_is_no_address_is_refused_with_what_to_write(text: str, advice: str) -> None:
    with pytest.raises(ValueError) as caught:
        checked_address(text, may_be_wildcard=False)
    assert advice in str(caught.value)


def test_all_addresses_of_a_machine_are_an_address_to_listen_on() -> None:
    assert checked_address("0.0.0.0", may_be_wildcard=True) == "0.0.0.0"
    assert is_wildcard("0.0.0.0") and is_wildcard("::")
    assert not is_wildcard("10.0.0.1") and not is_wildcard("pi1")


def test_loopback_is_told_from_other_addresses() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.8.0.1", "::1", "localhost", "LOCALHOST.", "a.localhost"]))
    assert not any(map(is_loopback, ["10.0.0.1", "0.0.0.0", "localhost.lan", "pi1"]))


def test_one_machine_has_one_text_however_it_is_written() -> None:
    assert machine_of("localhost") == machine_of("127.0.0.1")
    assert machine_of("FD00:0::10") == machine_of("fd00::10")
    assert machine_of("Pi1.lan.") == machine_of("pi1.lan")
    assert machine_of("127.0.0.1") != machine_of("127.0.0.2")
