"""What single tokens are as bytes; a text of many is for tokenizer.py, since it is not the sum of theirs."""

import re
from collections.abc import Collection

from tokenizers import Tokenizer as Backend

BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
# GPT-2's characters for bytes: printable bytes are themselves, the others start at U+0100.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted({*range(256)} - {*_PRINTABLE})
BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's sign for one


class Spelling:
    """Tokens as bytes. special_ids: tokens without text; they are spelled by their names."""

    def __init__(self, backend: Backend, special_ids: Collection[int]) -> None:
        self._backend = backend
        self._special_ids = special_ids
        self._added = {token: entry.content for token, entry in backend.get_added_tokens_decoder().items()}
        self._is_byte_level = is_byte_level(backend)

    def of(self, token: int) -> tuple[bytes, bool]:
        """Return a token's bytes, none of an unknown one, and whether they are part of a text."""
        if token in self._added:
            return self._added[token].encode(), token not in self._special_ids
        text = self._backend.id_to_token(token)
        if text is None:
            return b"", False
        if self._is_byte_level:
            return b"".join(bytes([BYTES[char]]) if char in BYTES else char.encode() for char in text), True
        if byte := BYTE_TOKEN.fullmatch(text):
            return bytes([int(byte[1], 16)]), True
        return text.replace(_SPACE, " ").encode(), True


def is_byte_level(backend: Backend) -> bool:
    """Return whether each character of a token's text stands for one byte."""
    return backend.decoder is not None and b'"ByteLevel"' in backend.decoder.__getstate__()
