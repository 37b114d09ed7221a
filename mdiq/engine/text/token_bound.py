"""A lower bound of a text's tokens without tokenizing it: a text that cannot fit is refused within milliseconds.

Theory: a token covers at most as many characters as its own text has. The longest texts are runs (of spaces, of
dashes), so a run counts as one character, in the text as in the tokens: tokens cut runs, which only adds to the sum.
"""

import re

import numpy as np
from tokenizers import Tokenizer as Backend

# These split a text and drop nothing of it. Behaviour "Removed" of the first three does.
_KEEPING = frozenset({"Split", "Punctuation", "Digits", "ByteLevel", "Metaspace", "Sequence"})


class TokenBound:
    """The bound of one tokenizer; 0 for every text if a token may cover any number of characters."""

    def __init__(self, backend: Backend) -> None:
        self._normalizer = backend.normalizer
        cuts = "" if backend.pre_tokenizer is None else backend.pre_tokenizer.__getstate__().decode()
        kinds = set(re.findall(r'"type":"(\w+)"', cuts))
        self._is_byte_level = "ByteLevel" in kinds  # then a character of a token's text is a byte
        model = backend.model
        covers_anything = (
            type(model).__name__ != "BPE"
            or not kinds <= _KEEPING
            or '"Removed"' in cuts
            or (model.fuse_unk and not model.byte_fallback)  # one unknown token for a whole run
            or any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
        )
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        tokens = [*backend.get_vocab(with_added_tokens=False), *map(self._as_tokens_are, added)]
        self._longest = 0 if covers_anything else int(_without_runs([token for token in tokens if token]).max())

    def min_tokens(self, text: str) -> int:
        """Return a lower bound of the text's tokens."""
        if not self._longest or not text:
            return 0
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        text = self._as_tokens_are(text)
        return -(-int(_without_runs([text])[0]) // self._longest) if text else 0

    def _as_tokens_are(self, text: str) -> str:
        return text.encode().decode("latin-1") if self._is_byte_level else text


def _without_runs(texts: list[str]) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Return the number of characters of each text, none of them empty, runs of one character counted as one."""
    lengths = np.array([len(text) for text in texts])
    starts = np.cumsum(lengths) - lengths
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)
    is_new = np.concatenate([[True], codes[1:] != codes[:-1]])
    is_new[starts] = True
    return np.add.reduceat(is_new.astype(np.int64), starts)
