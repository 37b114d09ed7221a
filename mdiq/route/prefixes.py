"""Which server has computed which beginnings of conversations. Pure.

A conversation is divided into blocks of bytes, each known by the hash of it and of all blocks before it. A server that
has answered one likely has its KV cache still, so what begins with the same blocks is best asked there. The router
cannot see what a server has evicted meanwhile: a block that it takes for cached costs at most a prompt.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

BLOCK_BYTES = 1_024
MAX_BLOCKS = 64
"""Of one conversation: its first 64 KiB tell enough."""
MAX_KNOWN = 65_536
"""Blocks of all conversations: some 10 MB."""
_HEAD = ("model", "tools", "tool_choice", "system", "instructions", "chat_template_kwargs")


class Prefixes:
    """Servers by the hashes of blocks, the least recently used forgotten first."""

    def __init__(self, max_known: int = MAX_KNOWN) -> None:
        self._max_known = max_known
        self._servers: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._servers)

    def note(self, chain: Sequence[bytes], server: str) -> None:
        """Note that a server computes a conversation with these blocks."""
        for key in reversed(chain):  # the first blocks, which most conversations share, are forgotten last
            self._servers[key] = server
            self._servers.move_to_end(key)
        while len(self._servers) > self._max_known:
            self._servers.popitem(last=False)

    def depths(self, chain: Sequence[bytes]) -> dict[str, int]:
        """Return how many blocks of a conversation each server has, those that have any."""
        found: dict[str, int] = {}
        for depth, key in enumerate(chain, 1):
            if (server := self._servers.get(key)) is None:
                break
            found[server] = depth  # it has computed all blocks before this one too
        return found

    def forget(self, server: str) -> None:
        """Forget what a server had: it is gone."""
        for key in [key for key, name in self._servers.items() if name == server]:
            del self._servers[key]


def chain_of(body: Mapping[str, Any]) -> list[bytes]:
    """Return the hashes of a request's blocks; none of a short one."""
    head = json.dumps({name: body[name] for name in _HEAD if body.get(name)}, sort_keys=True)
    texts: list[object] = []
    for name in ("messages", "input", "prompt"):
        given = body.get(name)
        texts += given if isinstance(given, list) else [given] if given is not None else []
    return _chain(head, (text if isinstance(text, str) else json.dumps(text, sort_keys=True) for text in texts))


def _chain(head: str, texts: Iterable[str]) -> list[bytes]:
    held = bytearray(head.encode(errors="replace") + b"\0")
    for text in texts:
        held += text.encode(errors="replace") + b"\0"
        if len(held) >= MAX_BLOCKS * BLOCK_BYTES:
            break
    keys: list[bytes] = []
    for start in range(0, min(len(held), MAX_BLOCKS * BLOCK_BYTES) - BLOCK_BYTES + 1, BLOCK_BYTES):
        before = keys[-1] if keys else b""
        keys.append(blake2b(before + held[start : start + BLOCK_BYTES], digest_size=16).digest())
    return keys
