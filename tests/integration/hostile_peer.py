"""A stranger's program: tries to get in at ports of a ring, all at once, and tells which let it in.

The first line of standard input is a JSON list of attempts: source, host, port, whether a ROUTER or a PULL is there;
either ``recorded`` (hexadecimal bytes to send again), or ``secret`` and ``server`` (CURVE keys in Z85), or none of them
for a peer without a key. It tries again and again until standard input ends; then a line of JSON comes out: for each
attempt whether the handshake succeeded.
"""

import contextlib
import json
import socket
import sys
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

AGAIN_MS = 300
GREETING_BYTES, HELLO_BYTES = 64, 202  # of a ZMTP connection with CURVE; RFC 23 and 26


def main() -> None:
    attempts = json.loads(sys.stdin.readline())
    with zmq.Context() as context:
        peers = [None if "recorded" in attempt else _Peer(context, attempt) for attempt in attempts]
        replies = [_replay(attempt) for attempt in attempts if "recorded" in attempt]
        sys.stdin.read()
        ends = [peer.ends() if peer else replies.pop(0) for peer in peers]
    sys.stdout.write(json.dumps(ends) + "\n")


class _Peer:
    """A socket that tries again and again."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", attempt: dict[str, Any]) -> None:
        self._socket = socket_ = context.socket(zmq.DEALER if attempt["is_router"] else zmq.PUSH)
        socket_.linger = 0
        socket_.reconnect_ivl = AGAIN_MS
        if "secret" in attempt:
            socket_.curve_secretkey = attempt["secret"].encode()
            socket_.curve_publickey = zmq.curve_public(attempt["secret"].encode())
            socket_.curve_serverkey = attempt["server"].encode()
        self._monitor = socket_.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        socket_.connect(f"tcp://{attempt['source']}:0;{attempt['host']}:{attempt['port']}")

    def ends(self) -> bool:
        """Close it; return whether it was let in."""
        with contextlib.suppress(zmq.Again):
            recv_monitor_message(self._monitor, zmq.NOBLOCK)
            return True
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        return False


def _replay(attempt: dict[str, Any]) -> bool:
    """Send what another peer has sent, waiting for the answers as it had to; return whether the end is READY."""
    recorded = bytes.fromhex(attempt["recorded"])
    assert recorded[GREETING_BYTES + 2 : GREETING_BYTES + 8] == b"\x05HELLO", "this is no handshake"
    heard = b""
    with socket.create_connection((attempt["host"], attempt["port"]), 3, (attempt["source"], 0)) as stream:
        hello = GREETING_BYTES + HELLO_BYTES
        for piece in (recorded[:GREETING_BYTES], recorded[GREETING_BYTES:hello], recorded[hello:]):
            with contextlib.suppress(OSError):
                stream.sendall(piece)
                heard += stream.recv(1_000)
    return b"\x05READY" in heard


if __name__ == "__main__":
    main()
