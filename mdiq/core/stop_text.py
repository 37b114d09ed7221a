"""Text of one answer, up to the first stop text. Knows characters only; engine/text/ makes text of tokens."""


class StopText:
    """Passes text on and ends it before the first of ``stops``.

    The first is the one that is complete first, and of several that end at one character the longest. So what comes out
    does not depend on how the text was cut into pieces.

    matched: a stop text has been found; nothing comes out any more.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        assert all(stops)  # SamplingParams refuses empty ones
        self._stops = stops
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Take the next piece in and return what is certain to be before any stop text."""
        if self.matched:
            return ""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.matched = True
            self._held = ""
            return text[: min(found)[1]]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """Return what was held back: the text has ended, so it begins no stop text after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` with which ``stop`` begins, short of the whole of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
