"""Addresses of devices: which texts are one, which of them mean this machine alone. No look-up, no network."""

import ipaddress
import re

from mdiq.config.units import shown

_LOOPBACK_NAMES = {"localhost", "ip6-localhost", "ip6-loopback"}
_EXAMPLE = "for example 192.168.1.10"


def checked_address(text: str, *, may_be_wildcard: bool) -> str:
    """Return an IP address or a host name.

    may_be_wildcard: it may also stand for all addresses of the machine, as in 0.0.0.0.

    Raises:
        ValueError: it is neither; the text says what to write.
    """
    if not text.strip():
        raise ValueError(f"it is empty; write the device's IP address or host name, {_EXAMPLE}")
    if match := re.fullmatch(r"[a-z+]+://(.*?)/?", text):
        raise ValueError(f"{shown(text)} begins with a protocol; write the address alone: {shown(_bare(match[1]))}")
    if text != text.strip() or re.search(r"\s", text):
        raise ValueError(f"{shown(text)} has a space in it; write one address, {_EXAMPLE}")
    if "/" in text:
        raise ValueError(
            f"{shown(text)} names a whole network; write the device's own address: {shown(text.split('/')[0])}"
        )
    if text.startswith("["):
        raise ValueError(f'{shown(text)} has brackets; write the IPv6 address in quotes alone: "{shown(_bare(text))}"')
    if re.fullmatch(r"[^:]+:\d+", text):
        host, _, port = text.partition(":")
        raise ValueError(
            f"{shown(text)} holds a port; write the address alone, {shown(host)}, and {port} as the port's own key"
        )
    if "%" in text:
        raise ValueError(f"{shown(text)} holds an interface of one machine; write an address that all devices can use")
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        _check_name(text)
        return text
    if address.is_unspecified and not may_be_wildcard:
        raise ValueError(
            f"{text} stands for all addresses of a machine, and nobody can call it; write the device's own, {_EXAMPLE}"
        )
    if address.is_multicast or text == "255.255.255.255":
        raise ValueError(f"{text} belongs to no single device; write the device's own address, {_EXAMPLE}")
    return text


def is_loopback(text: str) -> bool:
    """Return whether an address means the machine itself."""
    try:
        return ipaddress.ip_address(text).is_loopback
    except ValueError:
        name = text.lower().rstrip(".")
        return name in _LOOPBACK_NAMES or name.endswith(".localhost")


def is_wildcard(text: str) -> bool:
    """Return whether an address stands for all addresses of the machine."""
    try:
        return ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


def machine_of(text: str) -> str:
    """Return the same text for addresses that are written in different ways and mean the same."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        name = text.lower().rstrip(".")
        return "127.0.0.1" if name in _LOOPBACK_NAMES else name


def _check_name(text: str) -> None:
    if re.fullmatch(r"[\d.]+", text):
        parts = text.split(".")
        if len(parts) != 4 or "" in parts:
            raise ValueError(f"{shown(text)} is not an IPv4 address, which has 4 numbers; write {_EXAMPLE}")
        if too_large := [part for part in parts if int(part[:9]) > 255]:
            raise ValueError(
                f"{shown(text)} is not an IPv4 address: {shown(too_large[0])} is more than 255; write {_EXAMPLE}"
            )
        plain = ".".join(str(int(part)) for part in parts)
        raise ValueError(f"{shown(text)} has leading zeros, which some programs read as octal; write {plain}")
    if ":" in text:
        raise ValueError(f'{shown(text)} is not an IPv6 address; write for example "fd00::10"')
    labels = text.rstrip(".").split(".")
    if len(text) > 253 or not all(
        re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", label) for label in labels
    ):
        raise ValueError(f"{shown(text)} is neither an IP address nor a host name; write {_EXAMPLE} or pi1.lan")


def _bare(text: str) -> str:
    """Return an address without brackets and port."""
    if match := re.match(r"\[([^\]]*)\]", text):
        return match[1]
    return text.split(":")[0] if text.count(":") == 1 else text
