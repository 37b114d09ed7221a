"""JSON of clients that is not nested too deeply: what reads and writes it later goes down into it level by level."""

import json

MAX_NESTING = 200


class TooDeepError(ValueError):
    """JSON is nested deeper than MAX_NESTING levels."""

    def __init__(self) -> None:
        super().__init__(f"it is nested deeper than {MAX_NESTING} levels")


def loads(text: str | bytes) -> object:
    """Return the value of JSON.

    Raises:
        TooDeepError: it is nested too deeply.
        ValueError: it is not JSON.
    """
    try:
        value: object = json.loads(text)
    except RecursionError:
        raise TooDeepError from None
    opening = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if opening > MAX_NESTING:
        _check(value)
    return value


def _check(value: object) -> None:
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise TooDeepError
