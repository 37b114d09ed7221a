"""`mdiq api-key`: makes a key of the API, shows it once, and keeps its hash in the keys file."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from mdiq.api.keys import line_of, line_with, make_key, parse_keys
from mdiq.errors import ConfigError


def execute(name: str, file: Path | None, limits: Mapping[str, int]) -> int:
    """Print a new key; append its line to the file, or print it too if there is none. Return the exit code.

    Raises:
        ConfigError: the file cannot be used, or has the name already.
    """
    key = make_key()
    line = line_of(name, key, limits)
    if file is None:
        sys.stdout.write(f"{key}\n")
        sys.stderr.write(f"{line}\nput this line into the file that api.keys_file names\n")
        return 0
    _append(file, name, line)
    sys.stdout.write(f"{key}\n")
    sys.stderr.write(f"{file}: added {name}; the key is shown this once. mdiq reload has a running service take it\n")
    return 0


def _append(file: Path, name: str, line: str) -> None:
    # Never readable for others, not even for a moment.
    with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), "r+", encoding="ascii") as stream:
        if os.fstat(stream.fileno()).st_mode & 0o077:
            raise ConfigError(f"{file}: others can read it; run chmod 600 {file}")
        try:
            before = stream.read()
        except UnicodeDecodeError:
            raise ConfigError(f"{file}: it is not a file of keys: they are ASCII, one per line") from None
        if (number := line_with(name, before, str(file))) is not None:
            raise ConfigError(f"{file}:{number}: {name} is there already; remove that line, or choose another name")
        end = "" if not before or before.endswith("\n") else "\n"
        parse_keys(f"{before}{end}{line}\n", str(file))
        stream.write(f"{end}{line}\n")
