"""The byte streams in a capture of nodes/capture.py: what one end of each TCP connection has sent, put in order."""

import ipaddress
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SYN = 0x02


@dataclass(frozen=True, order=True)
class Way:
    """One direction of a connection."""

    source: str
    source_port: int
    target: str
    target_port: int


def read_streams(capture: Path, *, whole: bool = True) -> Mapping[Way, bytes]:
    """Return the bytes of every direction in which any were sent, those of all connections with the same ends together.

    whole: fail if a byte is missing; else, while the capture goes on, a stream ends in front of what is missing.
    """
    pieces: dict[Way, dict[int, bytes]] = {}
    starts: dict[Way, int] = {}
    for frame in _frames(capture.read_bytes()):
        if frame[12:14] != b"\x08\x00" or frame[23] != 6:
            continue  # not TCP in IPv4
        length = struct.unpack_from("!H", frame, 16)[0] or len(frame) - 14
        at = 14 + (frame[14] & 15) * 4
        source_port, target_port, number = struct.unpack_from("!HHI", frame, at)
        ends = (str(ipaddress.IPv4Address(frame[i : i + 4])) for i in (26, 30))
        way = Way(next(ends), source_port, next(ends), target_port)
        if frame[at + 13] & _SYN:
            starts[way] = number
        data = frame[at + (frame[at + 12] >> 4) * 4 : 14 + length]
        if data:
            offset = (number - starts[way] - 1) % 2**32
            if len(pieces.setdefault(way, {}).get(offset, b"")) < len(data):
                pieces[way][offset] = data
    return {way: _joined(way, found, whole=whole) for way, found in pieces.items()}


def _frames(data: bytes) -> list[bytes]:
    frames, at = [], 24
    while at + 16 <= len(data):
        size = struct.unpack_from("=IIII", data, at)[2]
        frames.append(data[at + 16 : at + 16 + size])
        at += 16 + size
    return frames


def _joined(way: Way, pieces: Mapping[int, bytes], *, whole: bool) -> bytes:
    stream = bytearray()
    for offset, data in sorted(pieces.items()):
        if offset > len(stream):
            assert not whole, f"{way}: the capture lacks {offset - len(stream)} bytes at {len(stream)}"
            break
        stream += data[len(stream) - offset :]  # sent again
    return bytes(stream)
