"""The keys of the API's clients: a file with one key per line, bare, or named with its limits.

    name sha256:HEX max_requests=4 tokens_per_minute=6000 share=2

A named key is kept as its SHA-256 only. A slow hash (bcrypt, scrypt) protects passwords that people think up, because
those can be guessed; keys are random and of at least 16 characters, so there is nothing to guess, and each request
would pay for it.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdiq.errors import ConfigError

MIN_CHARACTERS = 16
MAX_KEYS = 1_000  # each request is compared with all of them, and each has figures of its own
CREDENTIAL = "api.keys"
KEY_BYTES = 24
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_LIMITS = {"max_requests": 1 << 16, "tokens_per_minute": 1 << 40, "share": 100}


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key and what its clients may do.

    name: as logs and metrics show it. digest: SHA-256 of the key. max_requests: in flight, each prompt counted;
    tokens_per_minute: of prompts and answers; None: no limit. share: of the ring while others wait too. is_bare: its
    name is its place in the file.
    """

    name: str
    digest: bytes
    max_requests: int | None = None
    tokens_per_minute: int | None = None
    share: int = 1
    is_bare: bool = False

    @property
    def owner(self) -> str:
        """Whose its requests are. The name of a bare key is another one's when a line of the file goes."""
        return self.digest.hex() if self.is_bare else self.name


NO_KEY = ApiKey("", b"")
"""Of clients of an API that needs no key."""


def bare_keys(keys: Iterable[str]) -> list[ApiKey]:
    """Return keys without names of their own; they are called key1, key2, ..."""
    return [ApiKey(f"key{i}", _digest(key.encode()), is_bare=True) for i, key in enumerate(keys, 1)]


def find_key(keys: Sequence[ApiKey], sent: bytes) -> ApiKey | None:
    """Return the key that a client has sent."""
    digest = _digest(sent)
    # All are compared, so that the time taken reveals nothing.
    found = [key for key in keys if hmac.compare_digest(digest, key.digest)]
    return found[0] if found else None


def make_key() -> str:
    """Return a new random key."""
    return f"mdiq-{secrets.token_urlsafe(KEY_BYTES)}"


def line_of(name: str, key: str, limits: Mapping[str, int]) -> str:
    """Return the line of a key for the keys file.

    Raises:
        ConfigError: the name or a limit cannot be.
    """
    _check_name(name, "api-key")
    words = [f"{limit}={value}" for limit, value in limits.items()]
    line = " ".join([name, f"sha256:{_digest(key.encode()).hex()}", *words])
    _named(line, "api-key")
    return line


def read_keys(file: Path, environ: Mapping[str, str] = os.environ) -> list[ApiKey]:
    """Return the keys of a file, or of systemd's credential "api.keys" if there is one.

    Blank lines and lines that begin with # are ignored.

    Raises:
        ConfigError: it cannot be read, others can read it, or it holds no key, or one that cannot be.
    """
    is_credential = False
    if directory := environ.get("CREDENTIALS_DIRECTORY"):
        credential = Path(directory, CREDENTIAL)
        is_credential = credential.exists()
        file = credential if is_credential else file
    try:
        mode = file.stat().st_mode
        text = file.read_text(encoding="ascii")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; api.keys_file names it, and it has one key per line") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: keys are ASCII; write one per line") from None
    if mode & 0o077 and not is_credential:
        raise ConfigError(f"{file}: others can read it; run chmod 600 {file}")
    return parse_keys(text, str(file))


def parse_keys(text: str, where: str) -> list[ApiKey]:
    """Return the keys of a file's text; ``where`` is what messages call it. They never quote a line.

    Raises:
        ConfigError: it holds no key, too many, one twice, or one that cannot be.
    """
    keys: list[ApiKey] = []
    lines: dict[str | bytes, int] = {}
    for number, key in _keys_of(text, where):
        for what, same in (("key", key.digest), ("name", key.name)):
            if (first := lines.setdefault(same, number)) != number:
                raise ConfigError(f"{where}:{number}: the same {what} as in line {first}; remove one of them")
        keys.append(key)
    if not keys:
        raise ConfigError(f"{where}: it holds no key; make one with mdiq api-key NAME --file {where}")
    if len(keys) > MAX_KEYS:
        raise ConfigError(f"{where}: {len(keys)} keys; at most {MAX_KEYS} are taken")
    return keys


def line_with(name: str, text: str, where: str) -> int | None:
    """Return the number of the line that has this name in a file's text, or None; it may hold no key yet.

    Raises:
        ConfigError: a line before that one cannot be; ``where`` is what messages call the text.
    """
    return next((number for number, key in _keys_of(text, where) if key.name == name), None)


def _keys_of(text: str, where: str) -> Iterator[tuple[int, ApiKey]]:
    num_bare = 0
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line or line.startswith("#"):
            continue
        if len(line.split()) > 1:
            yield number, _named(line, f"{where}:{number}")
            continue
        if len(line) < MIN_CHARACTERS:
            told = f"a key of {len(line)} characters; take at least {MIN_CHARACTERS}, without spaces"
            raise ConfigError(f"{where}:{number}: {told}")
        num_bare += 1
        yield number, ApiKey(f"key{num_bare}", _digest(line.encode()), is_bare=True)


def _named(line: str, where: str) -> ApiKey:
    name, digest, *words = line.split()
    _check_name(name, where, "; a key by itself is without spaces")
    if (found := _HASH.fullmatch(digest)) is None:
        text = "sha256: and 64 hex digits come after the name; mdiq api-key writes such a line. A key by itself is "
        raise ConfigError(f"{where}: {text}without spaces")
    limits: dict[str, int] = {}
    for word in words:
        limit, _, value = word.partition("=")
        if limit not in _LIMITS or limit in limits:
            raise ConfigError(f"{where}: after the hash come {', '.join(f'{name}=N' for name in _LIMITS)}, each once")
        if not value.isdecimal() or not 1 <= int(value[:20]) <= _LIMITS[limit]:
            raise ConfigError(f"{where}: {limit}: write a whole number from 1 to {_LIMITS[limit]}")
        limits[limit] = int(value)
    return ApiKey(
        name,
        bytes.fromhex(found[1]),
        limits.get("max_requests"),
        limits.get("tokens_per_minute"),
        limits.get("share", 1),
    )


def _check_name(name: str, where: str, advice: str = "") -> None:
    if not NAME.fullmatch(name):
        text = "a name has up to 32 letters, digits, dots, dashes and underscores, and begins with a letter or digit"
        raise ConfigError(f"{where}: {text}{advice}")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
