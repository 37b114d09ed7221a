"""How a slow link is: what the command line says of it, and when a piece of a stream comes out. Pure; no clock."""

import math
import re
from dataclasses import dataclass

from mdiq.errors import ConfigError

EXAMPLE = "delay=20ms,bandwidth=10mbit,jitter=5ms"
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_BITS_PER_S = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_MAX_DELAY_S = 10.0
_MIN_BIT_PER_S = 1e4


@dataclass(frozen=True, slots=True)
class LinkShape:
    """A link in one direction.

    delay_s: how long a bit travels. jitter_s: each piece travels up to so much longer or shorter, evenly drawn.
    bandwidth_bit_per_s: how much it carries; 0 sets no limit.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bandwidth_bit_per_s: float = 0.0

    def __str__(self) -> str:
        parts = [f"delay={self.delay_s * 1e3:g}ms"]
        if self.bandwidth_bit_per_s:
            parts.append(f"bandwidth={self.bandwidth_bit_per_s / 1e6:g}mbit")
        if self.jitter_s:
            parts.append(f"jitter={self.jitter_s * 1e3:g}ms")
        return ",".join(parts)


def parse_link(text: str) -> LinkShape:
    """Return the LinkShape that a text like ``delay=20ms,bandwidth=10mbit,jitter=5ms`` describes.

    Raises:
        ConfigError: a name, a number or a unit is not right.
    """
    values: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        units = _BITS_PER_S if name == "bandwidth" else _SECONDS
        if name not in ("delay", "jitter", "bandwidth"):
            raise _error(text, f"{name!r} is not delay, bandwidth or jitter")
        if name in values:
            raise _error(text, f"{name} stands there twice")
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", value.strip().lower())
        if match is None or match[2] not in units:
            raise _error(text, f"{name} must be a number with one of the units {', '.join(units)}")
        values[name] = float(match[1]) * units[match[2]]
    shape = LinkShape(values.get("delay", 0.0), values.get("jitter", 0.0), values.get("bandwidth", 0.0))
    if shape.delay_s > _MAX_DELAY_S:
        raise _error(text, f"delay is more than {_MAX_DELAY_S:g} s")
    if shape.jitter_s > shape.delay_s:
        raise _error(text, "jitter is more than delay, and no bit arrives before it is sent")
    if "bandwidth" in values and not _MIN_BIT_PER_S <= shape.bandwidth_bit_per_s < math.inf:
        raise _error(text, f"bandwidth must be {_MIN_BIT_PER_S / 1e3:g}kbit or more")
    return shape


def _error(text: str, reason: str) -> ConfigError:
    return ConfigError(f"--link {text}: {reason}; write for example {EXAMPLE}")


class DelayLine:
    """When each piece of a stream comes out at the far end: in order, whatever the jitter."""

    def __init__(self, shape: LinkShape) -> None:
        self._shape = shape
        self._is_free_s = -math.inf  # when the last bit so far has left the near end
        self._last_s = -math.inf

    def release_s(self, num_bytes: int, now: float, draw: float) -> float:
        """Return when ``num_bytes`` that came at ``now`` are through.

        draw: an even draw from -1 to 1 for the jitter.
        """
        shape = self._shape
        self._is_free_s = max(self._is_free_s, now)
        if shape.bandwidth_bit_per_s:
            self._is_free_s += num_bytes * 8 / shape.bandwidth_bit_per_s
        self._last_s = max(self._is_free_s + shape.delay_s + draw * shape.jitter_s, self._last_s)
        return self._last_s
