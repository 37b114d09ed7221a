"""Texts and chats to token ids, and token ids to text, for a Hugging Face directory or a GGUF file.

Owns incremental decoding. GGUF vocabularies are built in engine/text/gguf_tokenizer.py, templates run in
engine/text/chat_template.py.
"""

import codecs
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from mdiq.core.sequence import SamplingParams
from mdiq.engine.model_config import read_json
from mdiq.engine.text.chat_template import ChatTemplate
from mdiq.engine.text.gguf_tokenizer import TokenizerParts, in_words, load_gguf_tokenizer
from mdiq.engine.text.spelling import BYTE_TOKEN, BYTES, Spelling, is_byte_level
from mdiq.engine.text.token_bound import TokenBound
from mdiq.errors import ConfigError, ContextLengthError, ModelError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_ID = (1 << 31) - 1
_MAX_WAITING = 64  # tokens that wait for the rest of a character
# Special tokens with these texts end an answer, beside those that a file names; the same as in llama.cpp.
_END_TEXTS = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|end|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<EOT>",
        "<|EOT|>",
    }
)
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A model's tokenizer; ``load`` makes one. Threads may share it.

    vocab_size: number of token ids of the model; some may have no text.
    special_ids: tokens without text in an answer. eos_token_ids: any of them ends an answer.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._backend = parts.backend
        self.vocab_size = parts.vocab_size
        self.has_chat_template = parts.chat_template is not None
        added = parts.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        # A file may name only one of two end tokens; a model's directory and its GGUF file must give the same set.
        known = {token for token in self.special_ids if added[token].content in _END_TEXTS}
        self.eos_token_ids = parts.eos_token_ids | known

    @classmethod
    def load(cls, model: Path) -> "Tokenizer":
        """Return the tokenizer of a .gguf file, or of a directory with tokenizer.json.

        Raises:
            ModelError: a file is missing or malformed, or the kind of tokenizer is not supported.
        """
        return cls(_load_directory(model) if model.is_dir() else load_gguf_tokenizer(model))

    def encode(self, text: str, *, has_special: bool = True) -> list[int]:
        """Return a text's ids. Special tokens in the text are recognized.

        has_special: with the model's BOS or EOS where it adds one.

        Raises:
            ConfigError: the text holds half a surrogate pair.
        """
        ids = self._ids(text)
        return [*self._parts.prefix, *ids, *self._parts.suffix] if has_special else ids

    def check_fits(self, text: str, room: int) -> None:
        """Refuse a text that cannot leave room for an answer among ``room`` tokens. It is not tokenized.

        Raises:
            ContextLengthError: it certainly has too many tokens; a text that passes may still have too many.
            ConfigError: a long text holds half a surrogate pair.
        """
        if len(text) <= room:  # short enough to tokenize quickly
            return
        _check_whole(text)
        least = self._bound.min_tokens(text) + len(self._parts.prefix) + len(self._parts.suffix)
        if least >= room:
            raise ContextLengthError(
                f"prompt: at least {least} tokens leave no room for an answer in {room}; shorten it"
            )

    def with_special_stops(self, params: SamplingParams) -> SamplingParams:
        """Return params with stop texts that are special tokens as stop tokens: they have no text in an answer."""
        ids = [self._backend.token_to_id(text) for text in params.stop]
        found = tuple(token for token in ids if token in self.special_ids)
        return replace(params, stop_token_ids=(*params.stop_token_ids, *found)) if found else params

    def chat_ids(
        self,
        messages: Iterable[Mapping[str, object]],
        template_kwargs: Mapping[str, object] | None = None,
        *,
        tools: Sequence[Mapping[str, object]] = (),
        room: int | None = None,
    ) -> list[int]:
        """Return the ids of a chat in the model's own format, up to where the assistant's answer begins.

        The model's BOS is at the start once, whether its template writes it or not. tools: that the model may call.
        room: see check_fits.

        Raises:
            ConfigError: the model has no chat template, or its template refuses the messages.
            ContextLengthError: it cannot fit.
            ModelError: the template is broken or hostile.
        """
        source = self._parts.chat_template or ""
        if "developer" not in source:  # OpenAI's newer name of the system role
            messages = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in messages]
        text = self._template.render(messages, self._parts.special_texts, template_kwargs, tools)
        if room is not None:
            self.check_fits(text, room)
        ids = self._ids(text)
        prefix = list(self._parts.prefix)
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    def decode(self, ids: Sequence[int], *, has_special: bool = False) -> str:
        """Return the text of ids; unknown ids have no text.

        Equals the output of ``stream``. Bytes that are not UTF-8 become U+FFFD. has_special: with special tokens.
        """
        text = self._backend.decode(
            [token for token in ids if 0 <= token <= _MAX_ID], skip_special_tokens=not has_special
        )
        if _REPLACEMENT not in text:
            return text
        # `tokenizers` decodes a whole run of byte tokens as U+FFFD if one byte is invalid. A stream has already
        # written the characters before that byte, so its output is the reference.
        stream = TextStream(self._backend, frozenset() if has_special else self.special_ids)
        return "".join([stream.push(token) for token in ids]) + stream.finish()

    def spell(self, token: int) -> tuple[bytes, bool]:
        """Return a token's bytes, and whether they are part of a text; those of a special token are its name."""
        return self._spelling.of(token)

    def stream(self) -> "TextStream":
        """Return a decoder for the tokens of one Sequence."""
        return TextStream(self._backend, self.special_ids)

    def text_of_special(self, token: int) -> str:
        """Return the text by which a special token is known."""
        return self._backend.id_to_token(token) or ""

    def special_id(self, text: str) -> int | None:
        """Return the special token of this text; None if it has none, or one that is a part of answers."""
        token = self._backend.token_to_id(text)
        return token if token in self.special_ids else None

    @property
    def digest(self) -> str:
        """A fingerprint: equal ones make the same tokens of texts and chats, and the same texts of tokens."""
        parts = self._parts
        others = (parts.prefix, parts.suffix, sorted(self.eos_token_ids), sorted(parts.special_texts.items()))
        text = f"{parts.backend.to_str()}\0{others}\0{parts.chat_template}"
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    @property
    def chat_template(self) -> str | None:
        """The source of the model's chat template."""
        return self._parts.chat_template

    def plain_ids(self, text: str) -> list[int]:
        """Return a text's ids, without any that stand before or after a whole text."""
        return self._ids(text)

    def token_bytes(self) -> list[bytes]:
        """Return the bytes that each id adds to an answer, below vocab_size; none for an id without text.

        A special token has those of its name. A first token's space stays, which ``decode`` drops for some models.
        """
        return [self._spelling.of(token)[0] for token in range(self.vocab_size)]

    def _ids(self, text: str) -> list[int]:
        _check_whole(text)
        # encode() would keep the interpreter's lock, for seconds at a long text; encode_batch() does not.
        return self._backend.encode_batch([text], add_special_tokens=False)[0].ids

    @cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self._backend, self.special_ids)

    @cached_property
    def _bound(self) -> TokenBound:
        return TokenBound(self._backend)

    @cached_property
    def _template(self) -> ChatTemplate:
        if self._parts.chat_template is None:
            raise ConfigError("messages: the model has no chat template; send a prompt as text")
        return ChatTemplate(self._parts.chat_template, self._parts.chat_template_where)


class TextStream:
    """Decode tokens as they come, in whole characters. The text is the concatenation of `push` and `finish`.

    Theory: the text of ids is not the sum of the texts of each (a character may need three tokens, and the space
    before a first word is dropped), so DecodeStream decodes the ids of the last piece together with the waiting ones,
    and returns the new text once that does not end within a character.

    special_ids: tokens that have no text; all others have.
    """

    def __init__(self, backend: Backend, special_ids: frozenset[int]) -> None:
        self._backend = backend
        self._special_ids = special_ids
        self._skips = bool(special_ids)
        self._stream = DecodeStream(skip_special_tokens=self._skips)
        self._given: list[int] = []  # the ids of the last piece
        self._waiting: list[int] = []  # the ids since

    def push(self, token: int) -> str:
        """Return the characters that this token completes; none for a special token or an id without text."""
        if token in self._special_ids or not 0 <= token <= _MAX_ID:
            return ""
        self._waiting.append(token)
        try:
            with in_words("its decoder cannot go on", "begin anew"):
                text = self._stream.step(self._backend, token)
        except ModelError:  # bytes change what is decoded already
            return self._restart()
        if text is None:
            return self._cut_short() if len(self._waiting) > _MAX_WAITING else ""
        self._given, self._waiting = self._waiting, []
        return text

    def _cut_short(self) -> str:
        """Return what cannot become characters any more: each further token would be decoded with all that wait."""
        last = self._waiting[-3:]  # a character has four bytes
        del self._waiting[-3:]
        return self.finish() + "".join([self.push(token) for token in last])

    def finish(self, *, drops_half: bool = False) -> str:
        """Return the text of tokens that still wait for the rest of a character.

        drops_half: without half a character at the end, which would be U+FFFD; a U+FFFD of the tokens themselves stays.
        """
        num_lost = len(self._half()) if drops_half else 0
        in_bytes = num_lost and is_byte_level(self._backend)
        if num_lost and not in_bytes:  # each of its bytes is a token
            del self._waiting[-num_lost:]
        before = self._backend.decode(self._given, skip_special_tokens=self._skips)
        text = self._backend.decode(self._given + self._waiting, skip_special_tokens=self._skips)
        if not text.startswith(before):
            before, text = "", self._backend.decode(self._waiting, skip_special_tokens=self._skips)
        if self._waiting:  # they are told, and not to be told again with what comes
            self._stream = DecodeStream(ids=self._given, skip_special_tokens=self._skips)
        self._given, self._waiting = [], []
        text = text[len(before) :]
        return text.removesuffix(_REPLACEMENT) if in_bytes else text

    def _half(self) -> bytes:
        """Return the bytes of a character at the end of the waiting tokens whose other bytes are missing."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        in_bytes = is_byte_level(self._backend)
        for token in self._waiting:
            text = self._backend.id_to_token(token) or ""
            if in_bytes and all(char in BYTES for char in text):
                decoder.decode(bytes(BYTES[char] for char in text))
            elif not in_bytes and (byte := BYTE_TOKEN.fullmatch(text)):
                decoder.decode(bytes([int(byte[1], 16)]))
            else:
                decoder.decode(text.encode())
        half: bytes = decoder.getstate()[0]
        return half

    def _restart(self) -> str:
        """Continue without the last piece: later bytes change its decoding, but it has already been written."""
        self._stream = DecodeStream(skip_special_tokens=self._skips)
        waiting, self._given, self._waiting = self._waiting, [], []
        return "".join([self.push(token) for token in waiting])


def _check_whole(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError("text: it holds half a surrogate pair; write the whole character") from None


def _load_directory(directory: Path) -> TokenizerParts:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{path}: no such file; a model directory needs it: fetch it, or save the tokenizer again with transformers"
        )
    with in_words(f"{path}: it cannot be read", "fetch the file again"):
        backend = Backend.from_file(str(path))
        backend.no_truncation()
        backend.no_padding()
        # In a directory, add_bos_token of tokenizer_config.json counts for nothing, as in transformers.
        prefix, suffix = _added_around(backend)
    config = _read_json(directory / "tokenizer_config.json")
    texts = {name: text for name in _SPECIAL_NAMES if (text := _token_text(config.get(name))) is not None}
    ids = {name: token for name, text in texts.items() if (token := backend.token_to_id(text)) is not None}
    # Files that were converted by hand may not mark them in tokenizer.json.
    backend.add_special_tokens([AddedToken(texts[name], normalized=False) for name in ids])
    model_config = _read_json(directory / "config.json")
    eos_token_ids = (
        _id_set(_read_json(directory / "generation_config.json").get("eos_token_id"))
        or _id_set(model_config.get("eos_token_id"))
    ) | ({ids["eos_token"]} if "eos_token" in ids else set())
    vocab_size = model_config.get("vocab_size")
    template, where = _directory_template(directory, config)
    return TokenizerParts(
        backend=backend,
        vocab_size=vocab_size if type(vocab_size) is int else backend.get_vocab_size(),
        eos_token_ids=frozenset(eos_token_ids),
        prefix=prefix,
        suffix=suffix,
        special_texts=texts,
        chat_template=template,
        chat_template_where=where,
    )


def _added_around(backend: Backend) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what the tokenizer's post-processor puts before and after a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start]), tuple(full[start + len(plain) :])
    return (), ()


def _directory_template(directory: Path, config: Mapping[str, object]) -> tuple[str | None, str]:
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: it cannot be read ({error}); fetch the file again") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    where = f"{directory / 'tokenizer_config.json'}: chat_template"
    return (template if isinstance(template, str) else None), where


def _read_json(path: Path) -> dict[str, object]:
    """Return a JSON object; an empty one if the file is missing."""
    return read_json(path) if path.exists() else {}


def _token_text(value: object) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _id_set(value: object) -> set[int]:
    return {token for token in (value if isinstance(value, list) else [value]) if type(token) is int}
