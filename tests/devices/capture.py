"""Copies what passes on the devices' network: run by `Capture` in that network, where it ends when its input does.

A record of the output is the port that a packet goes to and the length of its TCP payload, 4 bytes each, and the
payload; packets without one are left out.
"""

import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

_ETH_P_ALL, _ETH_P_IP, _TCP = 3, 0x0800, 6
_ETHERNET_BYTES = 14


def tcp_payload(frame: bytes) -> tuple[int, bytes]:
    """Return the port to which a frame goes, and its TCP payload: empty if it is none."""
    ip = frame[_ETHERNET_BYTES:]
    if len(ip) < 40 or int.from_bytes(frame[12:14]) != _ETH_P_IP or ip[9] != _TCP:
        return 0, b""
    tcp = ip[(ip[0] & 15) * 4 : int.from_bytes(ip[2:4])]
    return int.from_bytes(tcp[2:4]), tcp[(tcp[12] >> 4) * 4 :]


def payloads(path: Path, port: int) -> Iterator[bytes]:
    """Yield the payloads to a port that a capture holds."""
    data, start = path.read_bytes(), 0
    while start < len(data):
        to, size = struct.unpack_from("<II", data, start)
        if to == port:
            yield data[start + 8 : start + 8 + size]
        start += 8 + size


class Capture:
    """Captures while its block runs. tool: runs a command on the devices' network."""

    def __init__(self, tool: str, path: Path) -> None:
        self._command = [tool, "hub", sys.executable, __file__, str(path)]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None and self._process.stdout.readline() == b"captures\n"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(30) == 0


def main(path: Path) -> None:
    # No interface named: all of them, so that what passes from device to device is seen, too.
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as packets, path.open("wb") as out:
        packets.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        print("captures", flush=True)  # noqa: T201
        while True:
            ready, _, _ = select.select([packets, sys.stdin], [], [])
            if packets in ready:
                port, payload = tcp_payload(packets.recv(1 << 17))
                if payload:
                    out.write(struct.pack("<II", port, len(payload)) + payload)
            elif sys.stdin in ready:
                return


if __name__ == "__main__":
    main(Path(sys.argv[1]))
