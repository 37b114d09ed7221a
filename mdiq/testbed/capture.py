"""Copies what crosses the network of loopback.py into a file that Wireshark and tcpdump read.

    python -m mdiq.testbed.capture FILE [BRIDGE | NETWORK]

It runs in the namespace of a bridge (br0, if no name is given) and takes each packet once; with a network, 127.0.0.0/8,
it takes the packets of those addresses on loopback. It says ``captures`` when it has begun, and ends by SIGTERM;
it reports packets that the kernel dropped meanwhile, since a capture with holes proves nothing.
"""

import ipaddress
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BRIDGE = "br0"
QUIET_S = 0.2
_ETH_P_ALL = 0x0003
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h; Python has no name for it
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_BUFFER_BYTES = 128 << 20
_MAX_FRAME_BYTES = 256 << 10  # with offloading a frame is far longer than the link's MTU
_IPV4 = b"\x08\x00"


def main(file: Path, where: str = BRIDGE) -> int:
    """Copy until SIGTERM; return the exit code."""
    network = ipaddress.IPv4Network(where) if "/" in where else None
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as tap,
        file.open("wb", buffering=0) as out,
    ):
        try:
            tap.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        except PermissionError:
            tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        out.write(struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, _MAX_FRAME_BYTES, 1))  # pcap; 1: Ethernet
        sys.stdout.write("captures\n")
        sys.stdout.flush()
        for frame in _frames(tap, network, where, signals):
            seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
            out.write(struct.pack("=IIII", seconds, nanoseconds // 1000, len(frame), len(frame)) + frame)
        _, num_dropped = struct.unpack("=II", tap.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
    if num_dropped:
        sys.stderr.write(f"capture.py: {file}: {num_dropped} packets are missing; the machine was too busy\n")
    return 1 if num_dropped else 0


def _frames(
    tap: socket.socket, network: ipaddress.IPv4Network | None, bridge: str, signals: list[int]
) -> Iterator[bytes]:
    tap.settimeout(QUIET_S)
    while True:
        try:
            frame, (interface, _, kind, *_) = tap.recvfrom(_MAX_FRAME_BYTES)
        except TimeoutError:
            if signals:
                return  # all that had come before the signal is written
            continue
        is_ours = kind == socket.PACKET_OUTGOING
        if network is not None:
            is_wanted = interface == "lo" and not is_ours and _is_of(frame, network)
        else:
            # Each node's frames as they enter the bridge, and those that a relay beside it sends.
            is_wanted = is_ours if interface == bridge else not is_ours and interface.startswith("v")
        if is_wanted:
            yield frame


def _is_of(frame: bytes, network: ipaddress.IPv4Network) -> bool:
    return frame[12:14] == _IPV4 and any(ipaddress.IPv4Address(frame[i : i + 4]) in network for i in (26, 30))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
