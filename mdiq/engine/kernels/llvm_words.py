"""What compiled layers and their callers agree on; it needs no compiler. See llvm_layers_code.py."""

from enum import IntEnum, auto

LANES = 16
"""Floats of a vector: rows are multiples, and halves of heads of half of it."""


class Word(IntEnum):
    """Words of a Batch; those from HIDDEN on are addresses of rows, in this order."""

    NUM_ROWS = 0
    ARRIVALS = auto()  # address of how often threads came to wait, 0 before the first step
    COS = auto()  # addresses of f32 [rows, head_dim / 2]
    SIN = auto()
    SLOTS = auto()  # address of where K and V of each row go: i64 [rows]
    POOLS = auto()  # address of where the pools of K and V of each Layer of the cache are: i64 [layers, 2]
    READS = auto()  # address; what follows is as attend has it, see llvm_attention_code.py
    WIDTH = auto()
    BOUNDS = auto()  # address of the items that each thread begins with, and the end: i64 [threads + 1]
    SCORES = auto()
    SCORE_BYTES = auto()  # of each thread
    HIDDEN = auto()
    NORMED = auto()
    QKV = auto()
    FOUND = auto()
    UP = auto()
    ACTIVE = auto()
    CHANGE = auto()
    ROUNDED = auto()
