"""The identity of this program, for the names of cache files."""

import hashlib
from functools import cache
from pathlib import Path


@cache
def engine_digest() -> str:
    """Return a mark of the engine's code: what it makes may change with any of it."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
