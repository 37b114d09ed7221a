"""Build a `tokenizers` tokenizer from a GGUF file's vocabulary, merges and name of a pre-tokenizer.

Owns the table of pre-tokenizers. formats/gguf_file.py parses the file, tokenizer.py uses the result.
Keys and defaults: ggml's docs/gguf.md and llama.cpp's llama_vocab.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mdiq.engine.formats.gguf_file import GgufFile
from mdiq.errors import ModelError

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type
_SPECIAL_NAMES = ("bos", "eos", "unknown", "padding", "eot", "eom")
_MAX_MERGED_CHARS = 256  # of a token for which merges are derived; the longest in use has 31


@dataclass(frozen=True, slots=True)
class TokenizerParts:
    """The input of engine/text/tokenizer.py, independent of the model's format.

    prefix, suffix: ids that the model wants around every text (BOS, EOS).
    special_texts: by the names that chat templates know, such as bos_token.
    chat_template_where: names the template in errors.
    """

    backend: Tokenizer
    vocab_size: int
    eos_token_ids: frozenset[int]
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    special_texts: Mapping[str, str]
    chat_template: str | None
    chat_template_where: str


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """How text is split before byte-pair merges: each pattern splits the pieces of the one before it.

    ignores_merges: a piece that is itself a token stays whole, even if no merges produce it.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_QWEN35 = _CONTRACTION + (
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED_CODER = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
# Letters of scripts with upper and lower case, as the model's authors list them.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{_CASED}]+",
    r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[一-龥ࠀ-一가-퟿]+",
    r"\p{N}+",
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT2_ROW = _PreTokenizer((_GPT2,))
_DIGITS_ROW = _PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3_ROW = _PreTokenizer((_LLAMA3,), ignores_merges=True, adds_bos=True)
_QWEN2_ROW = _PreTokenizer((_QWEN2,), nfc=True)
_GPT4O_ROW = _PreTokenizer((_GPT4O,))
# llama.cpp's names. The patterns are those of the models' own tokenizer.json, as are nfc and ignores_merges;
# adds_bos is llama.cpp's default where the file does not say.
_PRE_TOKENIZERS: Mapping[str, _PreTokenizer] = {
    # llama.cpp's default for a file that names none: close to several models, and exact for few.
    "default": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4"), _GPT2_ROW),
    **dict.fromkeys(("gigachat", "a.x-4.0", "mellum"), _GPT2_ROW),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "minerva-7b", "exaone"), _DIGITS_ROW),
    "deepseek-coder": _PreTokenizer(
        ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"), adds_bos=True
    ),
    "deepseek-llm": _PreTokenizer(_DEEPSEEK_LLM, adds_bos=True),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _PreTokenizer(_DEEPSEEK_V3)),
    "command-r": _PreTokenizer((r"\p{N}", _GPT2), nfc=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2"), _LLAMA3_ROW),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _PreTokenizer((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "megrez"), _QWEN2_ROW),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2", "hunyuan"), _PreTokenizer((_QWEN2,))),
    "qwen35": _PreTokenizer((_QWEN35,), nfc=True),
    "seed-coder": _PreTokenizer((_SEED_CODER,)),
    "tekken": _PreTokenizer((_TEKKEN,), ignores_merges=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O_ROW),
}


@contextmanager
def in_words(what: str, advice: str) -> Iterator[None]:
    """Make a ModelError of what `tokenizers` raises: plain Exceptions."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"{what} ({' '.join(str(error).split())[:120]}); {advice}") from None


def load_gguf_tokenizer(path: Path) -> TokenizerParts:
    """Return the tokenizer of a GGUF file.

    Raises:
        ModelError: the file is malformed, holds no vocabulary, or its kind of tokenizer is not supported.
    """
    with GgufFile(path) as file:
        vocabulary = _Vocabulary(file)
        kind = file.get("tokenizer.ggml.model", str, "")
        if kind == "gpt2":
            pre = _pre_tokenizer(path, file.get("tokenizer.ggml.pre", str, "default"))
            adds_bos, has_prefix_space = pre.adds_bos, False
        elif kind == "llama":
            adds_bos, has_prefix_space = True, file.get("tokenizer.ggml.add_space_prefix", bool, True)
        else:
            raise ModelError(
                f"{path}: tokenizer.ggml.model: {kind[:40] or 'none'} is not supported; use a model with gpt2 "
                "(byte-level BPE) or llama (SentencePiece BPE)"
            )
        ids = _special_ids(file, vocabulary, is_sentencepiece=kind == "llama")
        adds_bos = file.get("tokenizer.ggml.add_bos_token", bool, adds_bos and "bos" in ids)
        adds_eos = file.get("tokenizer.ggml.add_eos_token", bool, False)
        for adds, name in ((adds_bos, "bos"), (adds_eos, "eos")):
            if adds and name not in ids:
                raise ModelError(
                    f"{path}: tokenizer.ggml.add_{name}_token is set and {name}_token_id is missing; "
                    "fetch or convert the file again"
                )
        template = file.get("tokenizer.chat_template", str, "") or None
    with in_words(f"{path}: its tokenizer is malformed", "fetch or convert it again"):
        if kind == "gpt2":
            backend = _byte_level(vocabulary, pre)
        else:
            backend = _sentencepiece(vocabulary, ids.get("unknown"), has_prefix_space=has_prefix_space)
        _add_special_tokens(backend, vocabulary, ids, is_sentencepiece=kind == "llama")
    tokens = vocabulary.tokens
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return TokenizerParts(
        backend=backend,
        vocab_size=len(tokens),
        eos_token_ids=frozenset(ids[name] for name in ("eos", "eot", "eom") if name in ids),
        prefix=(ids["bos"],) if adds_bos else (),
        suffix=(ids["eos"],) if adds_eos else (),
        special_texts={names[name]: tokens[i] for name, i in ids.items() if name in names},
        chat_template=template,
        chat_template_where=f"{path}: tokenizer.chat_template",
    )


class _Vocabulary:
    """The vocabulary's columns, of equal length. ``merges`` is None where the file has none."""

    def __init__(self, file: GgufFile) -> None:
        self.tokens = self._texts(file, "tokenizer.ggml.tokens") or []
        self.merges = self._texts(file, "tokenizer.ggml.merges")
        self.types = [int(kind) for kind in self._numbers(file, "tokenizer.ggml.token_type")]
        self.scores = [float(score) for score in self._numbers(file, "tokenizer.ggml.scores")]
        if not self.tokens:
            raise ModelError(f"{file.path}: tokenizer.ggml.tokens is missing; use a file with its tokenizer inside")
        for name, column in (("token_type", self.types), ("scores", self.scores)):
            if column and len(column) != len(self.tokens):
                raise ModelError(
                    f"{file.path}: tokenizer.ggml.{name} has {len(column)} entries for {len(self.tokens)} tokens; "
                    "fetch or convert the file again"
                )

    def of_type(self, *types: int) -> list[int]:
        """Return the ids of these types."""
        return [i for i, kind in enumerate(self.types) if kind in types]

    def ids(self) -> dict[str, int]:
        """Return the id of each text; for duplicates the last id, as in llama.cpp."""
        return {text: i for i, text in enumerate(self.tokens)}

    @staticmethod
    def _texts(file: GgufFile, key: str) -> list[str] | None:
        value = file.fields.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ModelError(f"{file.path}: {key} is not an array of texts; fetch or convert the file again")
        return value

    @staticmethod
    def _numbers(file: GgufFile, key: str) -> list[float]:
        value = file.fields.get(key)
        if value is None:
            return []
        if not isinstance(value, np.ndarray):
            raise ModelError(f"{file.path}: {key} is not an array of numbers; fetch or convert the file again")
        numbers: list[float] = value.tolist()
        return numbers


def _pre_tokenizer(path: Path, name: str) -> _PreTokenizer:
    if name not in _PRE_TOKENIZERS:
        raise ModelError(
            f"{path}: tokenizer.ggml.pre: {name[:40]} is not supported; supported are {', '.join(_PRE_TOKENIZERS)}: "
            "use the model's safetensors directory"
        )
    return _PRE_TOKENIZERS[name]


def _special_ids(file: GgufFile, vocabulary: _Vocabulary, *, is_sentencepiece: bool) -> dict[str, int]:
    defaults = {"unknown": 0, "bos": 1, "eos": 2} if is_sentencepiece else {}
    ids: dict[str, int] = {}
    for name in _SPECIAL_NAMES:
        key = f"tokenizer.ggml.{name}_token_id"
        if key in file.fields:
            number = file.get(key, int)
            if not 0 <= number < len(vocabulary.tokens):
                raise ModelError(
                    f"{file.path}: {key} is {number}, and there are {len(vocabulary.tokens)} tokens; "
                    "fetch or convert the file again"
                )
            ids[name] = number
        elif name in defaults and defaults[name] < len(vocabulary.tokens):
            ids[name] = defaults[name]
    return ids


def _byte_level(vocabulary: _Vocabulary, pre: _PreTokenizer) -> Tokenizer:
    """GPT-2's BPE: each byte is a printable character, so nothing is unknown."""
    merges = [_pair(merge) for merge in vocabulary.merges or ()]
    backend = Tokenizer(models.BPE(vocab=vocabulary.ids(), merges=merges, ignore_merges=pre.ignores_merges))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(vocabulary: _Vocabulary, unknown: int | None, *, has_prefix_space: bool) -> Tokenizer:
    """SentencePiece's BPE: spaces are ▁, and characters without a token become their bytes.

    As in llama.cpp and SentencePiece, a space is also put before a text that begins with spaces.
    """
    merges = _merges_from_scores(vocabulary) if vocabulary.merges is None else map(_pair, vocabulary.merges)
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids(),
            merges=list(merges),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if has_prefix_space else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip: list[decoders.Decoder] = [decoders.Strip(" ", 1, 0)] if has_prefix_space else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _merges_from_scores(vocabulary: _Vocabulary) -> Iterable[tuple[str, str]]:
    """Return every way to make a token from two, best first: SentencePiece joins the pair whose token scores best."""
    scores = vocabulary.scores or [0.0] * len(vocabulary.tokens)
    types = vocabulary.types or [1] * len(vocabulary.tokens)
    # Text that looks like a control or a byte token stays text; SentencePiece does not match those pieces.
    mergeable = {
        text: i
        for i, text in enumerate(vocabulary.tokens)
        if types[i] not in (_UNKNOWN, _CONTROL, _BYTE) and len(text) <= _MAX_MERGED_CHARS
    }
    ranked: list[tuple[float, int, int, str, str]] = []
    for text, i in mergeable.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in mergeable and right in mergeable:
                # For equal scores the earlier token, then the longer left part, as the usual conversions rank them.
                ranked.append((-scores[i], i, -cut, left, right))
    ranked.sort()
    return ((left, right) for *_, left, right in ranked)


def _add_special_tokens(
    backend: Tokenizer, vocabulary: _Vocabulary, ids: Mapping[str, int], *, is_sentencepiece: bool
) -> None:
    """Match special tokens as a whole in a text. User-defined ones, such as <think>, stay in decoded text."""
    tokens = vocabulary.tokens
    special = {*vocabulary.of_type(_CONTROL), *(ids[name] for name in ("bos", "eos", "eot", "eom") if name in ids)}
    if is_sentencepiece:
        special.update(vocabulary.of_type(_UNKNOWN))
    backend.add_special_tokens([AddedToken(tokens[i], normalized=False) for i in sorted(special) if tokens[i]])
    users = [tokens[i] for i in vocabulary.of_type(_USER_DEFINED) if tokens[i] and i not in special]
    backend.add_tokens([AddedToken(text, normalized=False) for text in users])


def _pair(merge: str) -> tuple[str, str]:
    cut = merge.find(" ", 1)  # a token may begin with a space
    if cut < 0:
        raise ValueError(f"merge {merge[:40]!r} is not two tokens")
    return merge[:cut], merge[cut + 1 :]
