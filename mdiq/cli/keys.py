"""`mdiq keys`: makes the nodes' key pairs and writes the public ones into the topology, changing nothing else in it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from mdiq.errors import ConfigError
from mdiq.service.public_keys import check_private_key, read_entries, read_text, with_public_keys, write_text
from mdiq.transport.keys import key_file, make_keys

_PLACEHOLDER = "0" * 40


def execute(file: Path, rotate: Sequence[str], *, dry_run: bool) -> int:
    """Make the keys that are missing, and new ones for the names in ``rotate``; return the exit code.

    Raises:
        ConfigError: the file, the folder or a key cannot be used.
    """
    text = read_text(file)
    folder, entries = read_entries(file, text)
    names = [entry.name for entry in entries]
    for name in rotate:
        if name not in names:
            raise ConfigError(f"--rotate {name}: {file} has no such node; it has {', '.join(names)}")
    for entry in entries:
        if entry.name not in rotate:
            check_private_key(file, folder, entry)
    wanted = [entry for entry in entries if entry.public_key is None or entry.name in rotate]
    # What cannot be edited is found before a key is made.
    with_public_keys(file, text, wanted, dict.fromkeys(names, _PLACEHOLDER))
    public: dict[str, str] = {}
    for entry in wanted:
        is_new = entry.name in rotate or not key_file(folder, entry.name).exists()
        what = "new private key" if is_new else "public key of"
        sys.stderr.write(f"{entry.name}: {what} {key_file(folder, entry.name)}\n")
        if not dry_run:
            public |= make_keys(folder, [entry.name], replace=entry.name in rotate)
    if wanted and not dry_run:
        write_text(file, with_public_keys(file, text, wanted, public))
    verb = "would write" if dry_run else "wrote"
    sys.stderr.write(f"{file}: {verb} {len(wanted)} public keys, {len(entries) - len(wanted)} stay\n")
    return 0
