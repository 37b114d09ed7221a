"""The keys of the API's clients: a file with one key per line."""

import os
from collections.abc import Mapping
from pathlib import Path

from mdiq.errors import ConfigError

MIN_CHARACTERS = 16
CREDENTIAL = "api.keys"


def read_keys(file: Path, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the keys of a file, or of systemd's credential "api.keys" if there is one.

    Blank lines and lines that begin with # are ignored.

    Raises:
        ConfigError: it cannot be read, others can read it, or it holds no key or a short one.
    """
    is_credential = False
    if directory := environ.get("CREDENTIALS_DIRECTORY"):
        credential = Path(directory, CREDENTIAL)
        is_credential = credential.exists()
        file = credential if is_credential else file
    try:
        mode = file.stat().st_mode
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; api.keys_file names it, and it has one key per line") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: keys are ASCII; write one per line") from None
    if mode & 0o077 and not is_credential:
        raise ConfigError(f"{file}: others can read it; run chmod 600 {file}")
    keys = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{file}: it holds no key; write one per line, for example from openssl rand -hex 24")
    for key in keys:
        if len(key) < MIN_CHARACTERS or " " in key:
            raise ConfigError(f"{file}: a key of {len(key)} characters; take at least {MIN_CHARACTERS}, without spaces")
    return keys
