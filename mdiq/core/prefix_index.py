"""The prefixes that are in the Ring's KV cache, and the ids that hold them. An index only; ring.py acts on it.

A KvBlock is identified by the hash of its tokens and of all tokens before them, so equal hashes mean equal blocks at
every Stage. A Sequence in the Ring holds what it has sent. The prefix of a Sequence that has ended stays cached
(*retained*) until its room is needed; the least recently used is evicted first.
"""

from collections.abc import Container
from hashlib import blake2b

from mdiq.core.sequence import Sequence
from mdiq.core.types import SeqId


class PrefixIndex:
    """Holders of cached prefixes by the hash of their last KvBlock.

    max_tokens: maximum tokens that retained ids hold together; None: no limit; 0 turns the index off.
    """

    def __init__(self, block_tokens: int, max_tokens: int | None = None) -> None:
        self._block_tokens = block_tokens
        self._max_tokens = max_tokens
        self._chains: dict[SeqId, list[bytes]] = {}
        self._holders: dict[bytes, dict[SeqId, None]] = {}  # a dict for its order: the oldest holder is first
        self._retained: dict[SeqId, None] = {}  # least recently used first

    @property
    def retained(self) -> list[SeqId]:
        """Ids of ended Sequences that are kept, least recently used first."""
        return list(self._retained)

    @property
    def retained_tokens(self) -> int:
        return sum(len(self._chains[seq_id]) for seq_id in self._retained) * self._block_tokens

    @property
    def is_over(self) -> bool:
        """Whether more than ``max_tokens`` are retained."""
        return self._max_tokens is not None and self.retained_tokens > self._max_tokens

    def extend(self, seq_id: SeqId, sequence: Sequence, num_tokens: int) -> None:
        """Note that the first ``num_tokens`` of a Sequence have been sent: its whole KvBlocks can be found now."""
        if self._max_tokens == 0:
            return
        chain = self._chains.get(seq_id, [])
        for depth in range(len(chain), num_tokens // self._block_tokens):
            chain.append(self._hash(chain[-1] if chain else b"", sequence, depth))
            self._holders.setdefault(chain[-1], {})[seq_id] = None
        if chain:
            self._chains[seq_id] = chain

    def longest(self, sequence: Sequence) -> tuple[SeqId, int] | None:
        """Return the holder of a Sequence's longest cached prefix, and the length of that in tokens, or None.

        The last known token is not among them: its row is what the next token is drawn from.
        """
        found: tuple[SeqId, int] | None = None
        key = b""
        for depth in range((sequence.num_tokens - 1) // self._block_tokens):
            key = self._hash(key, sequence, depth)
            if key not in self._holders:
                break
            found = next(iter(self._holders[key])), (depth + 1) * self._block_tokens
        return found

    def touch(self, seq_id: SeqId) -> None:
        """Note the use of a prefix: its holder, if it has ended, is evicted last."""
        if seq_id in self._retained:
            del self._retained[seq_id]
            self._retained[seq_id] = None

    def retain(self, seq_id: SeqId) -> bool:
        """Keep the prefixes of a Sequence that has ended; return whether there are any."""
        if seq_id in self._chains:
            self._retained[seq_id] = None
        return seq_id in self._chains

    def covered(self, seq_id: SeqId) -> list[SeqId]:
        """Return the retained ids that this one makes redundant: it holds all that they hold."""
        chain = self._chains[seq_id]
        return [
            other
            for depth, key in enumerate(chain)
            for other in self._holders[key]
            if other != seq_id and other in self._retained and len(self._chains[other]) == depth + 1
        ]

    def to_give_up(self, pinned: Container[SeqId | None]) -> list[SeqId]:
        """Return the retained ids that may be evicted, least recently used first."""
        return [seq_id for seq_id in self._retained if seq_id not in pinned]

    def remove(self, seq_id: SeqId) -> None:
        """Forget what an id holds; one that is unknown is ignored."""
        self._retained.pop(seq_id, None)
        for key in self._chains.pop(seq_id, ()):
            del self._holders[key][seq_id]
            if not self._holders[key]:
                del self._holders[key]

    def _hash(self, previous: bytes, sequence: Sequence, depth: int) -> bytes:
        tokens = sequence.tokens(depth * self._block_tokens, (depth + 1) * self._block_tokens)
        return blake2b(previous + str(tokens).encode(), digest_size=32).digest()
