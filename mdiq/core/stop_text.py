"""The text of one answer, up to the first stop text. Characters only; engine/text/ decodes tokens."""


class StopText:
    """Passes text through and ends it before the first of ``stops``.

    The first is the one that is complete first, and the longest if several end at the same character. So the output
    does not depend on how the text was cut into pieces.

    matched: a stop text has been found; there is no more output. found: that text.
    may_end: while it is False, a stop text that is complete is text like any other.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        assert all(stops)  # SamplingParams refuses empty ones
        self._stops = stops
        self._held = ""
        self.matched = False
        self.may_end = True
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add the next piece and return the text that certainly comes before any stop text."""
        if self.matched:
            return ""
        num_known = len(self._held)  # a stop text ends after them; one before that was complete before it could end
        text = self._held + text
        starts = [(text.find(stop, max(num_known - len(stop) + 1, 0)), stop) for stop in self._stops]
        found = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if found and self.may_end:
            self.matched = True
            self._held = ""
            end, start = min(found)
            self.found = text[start:end]
            return text[:start]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """Return the text that was held back: the answer has ended, so no stop text begins there."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
