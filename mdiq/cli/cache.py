"""`mdiq cache`: what the cache holds and when it was last used, and forgetting it at once."""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from mdiq.cache import Entry, State, cache_directory, entries, forget, limit_bytes, state_of
from mdiq.errors import ConfigError

_STAYS = {
    State.IN_USE: "it is in use",
    State.UNKNOWN: "whether it is in use cannot be told; delete it by hand when nothing uses it",
    State.FOREIGN: "mdiq did not put it there; delete it by hand",
}


def show(*, as_json: bool) -> int:
    """Print what the cache holds, in the order in which it is forgotten; return the exit code.

    Raises:
        ConfigError: the limit is not a number.
        OSError: the cache cannot be read.
    """
    root = cache_directory()
    found = [(entry, state) for entry in entries(root) if (state := state_of(entry)) is not State.GONE]
    held_bytes = sum(entry.num_bytes for entry, state in found if state is not State.FOREIGN)
    there = next(folder for folder in (root, *root.parents, Path()) if folder.is_dir())
    most, is_given = limit_bytes(there, held_bytes)
    if as_json:
        value = {
            "folder": str(root),
            "bytes": held_bytes,
            "limit_bytes": most,
            "entries": [
                {
                    "name": entry.name,
                    "kind": entry.path.parent.name,
                    "bytes": entry.num_bytes,
                    "last_used": datetime.fromtimestamp(entry.used_s, UTC).isoformat(timespec="seconds"),
                    "state": state,
                }
                for entry, state in found
            ],
        }
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
        return 0
    for entry, state in found:
        used = datetime.fromtimestamp(entry.used_s).strftime("%Y-%m-%d %H:%M")
        sys.stdout.write(f"{_megabytes(entry.num_bytes):>10}  {used}  {state:7}  {_shown(entry)}\n")
    why = "MDIQ_CACHE_GB" if is_given else "half of what it holds and its disk has free; set MDIQ_CACHE_GB for another"
    sys.stdout.write(f"{root}: {_megabytes(held_bytes)} of {_megabytes(most)} ({why})\n")
    return 0


def clear(names: Sequence[str], *, dry_run: bool) -> int:
    """Remove unused entries, all or the named ones; return the exit code: 1 if a named one stays.

    Raises:
        ConfigError: there is nothing of such a name.
        OSError: the cache cannot be read.
    """
    root = cache_directory()
    found = entries(root)
    chosen = [entry for entry in found if not names or _is_named(entry, names)]
    for name in names:
        if not any(_is_named(entry, [name]) for entry in chosen):
            raise ConfigError(f"{name}: nothing of that name is in {root}; see mdiq cache list")
    num_removed = num_bytes = num_failed = 0
    for entry in chosen:
        try:
            state = state_of(entry) if dry_run else forget(entry)
        except OSError as error:
            sys.stderr.write(f"mdiq: {error.filename or entry.path}: {error.strerror}\n")
            num_failed += 1
            continue
        if state is State.FREE:
            num_removed, num_bytes = num_removed + 1, num_bytes + entry.num_bytes
            sys.stdout.write(f"{'would remove' if dry_run else 'removed'} {_shown(entry)}\n")
        elif state is not State.GONE:
            sys.stdout.write(f"stays: {_shown(entry)}: {_STAYS[state]}\n")
            num_failed += bool(names)
    verb = "would free" if dry_run else "freed"
    sys.stdout.write(f"{root}: {verb} {_megabytes(num_bytes)}, {num_removed} of {len(chosen)} entries\n")
    return 1 if num_failed else 0


def _is_named(entry: Entry, names: Sequence[str]) -> bool:
    own = (entry.name, entry.path.name, entry.path.parent.name, str(entry.path))
    return any(name.rstrip("/") in own for name in names)


def _shown(entry: Entry) -> str:
    # Anybody may have named it: a line stays one line.
    return entry.name if entry.name.isprintable() else ascii(entry.name)


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
