"""Devices, a link and a model with round figures, from which values can be computed by hand."""

from dataclasses import replace

from mdiq.report.catalogue import Device, Figure, LinkKind, Mark, Shape
from mdiq.report.simulate_nodes import Held
from mdiq.report.simulate_rings import Question

GIB = 1 << 30

# A layer: attention 1,000 x 100 x 2 x 20 = 4e6, MLP 2 x 1,000 x 47,500 = 95e6. Ten of them and a head of 10e6: 1e9.
BILLION = Shape("billion", 10, 1_000, 10, 10, 100, 47_500, 10_000, is_tied=True, is_gated=False, mark=Mark.CITED)
BYTES = Held("bytes", 8.0, 8.0)
"""A byte a weight: BILLION has 1 GB."""


def cited(value: float) -> Figure:
    return Figure(value, Mark.CITED, "https://example.org")


BOX = Device(
    "box",
    "a box",
    memory_bytes=cited(4 * GIB),
    read_bytes_per_s=cited(10e9),
    flop_per_s=cited(1e15),
    forward_s=cited(0.0),
    process_bytes=cited(0.5 * GIB),
    idle_w=cited(5.0),
    load_w=cited(15.0),
)
"""It reads 10 GB/s, and its arithmetic takes no time."""
SMALL = replace(BOX, name="small", memory_bytes=cited(1 * GIB))
"""Next to its process it has 0.5 GiB."""
FREE = LinkKind("free", "a link that takes no time", cited(1e18), cited(0.0))


def question(*devices: Device, users: int = 1, link: LinkKind = FREE) -> Question:
    """Return a question about BILLION with contexts so short that they cost nothing to speak of."""
    return Question(BILLION, BYTES, devices, link, users, prompt_tokens=1, answer_tokens=1)
