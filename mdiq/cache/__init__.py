"""This machine's cache folder: where it is, its file locks, whether there is room, and what is forgotten to make some.

models/    model files that were fetched              packed/  weights in 8 and 4 bits, by model and format
weights/   layers that a Node has from its Starter    shapes/  files of random weights
hashes/    what an earlier layout left              kernels.json, profiles/, code/, costs/
                                                    what was measured or compiled once; small, in bounds, no Entries

An Entry is a file or folder directly in one of the first five. Its users hold a shared lock on it (``use``), so only
what nobody uses is forgotten. It carries the time of its last use: a folder as its time of change, a file as its time
of access, since what is packed from a model is named after the model's time of change.
"""

from mdiq.cache.files import (
    NO_SPACE,
    Use,
    cache_directory,
    keep,
    keep_small,
    locked,
    no_space,
    put_whole,
    says_no_space,
    scratch_directory,
    try_lock,
    use,
    write_whole,
)
from mdiq.cache.room import LIMIT, Entry, State, entries, forget, limit_bytes, make_room, state_of, temporary

__all__ = [
    "Entry",
    "LIMIT",
    "NO_SPACE",
    "State",
    "Use",
    "cache_directory",
    "entries",
    "forget",
    "keep",
    "keep_small",
    "limit_bytes",
    "locked",
    "make_room",
    "no_space",
    "put_whole",
    "says_no_space",
    "scratch_directory",
    "state_of",
    "temporary",
    "try_lock",
    "use",
    "write_whole",
]
