"""Encode dataclasses as messages and decode them. The messages are defined in control.py and weights.py.

A message is a version byte, a msgpack map with its type's name and its fields, and a keyed tag. Every field is checked
against its annotation, so a message that decodes has the types that mypy believes it has. A field may be a dataclass
itself: a map of its own fields.
"""

import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import msgpack

from mdiq.core.wire import TAG_BYTES, make_tag
from mdiq.errors import LocalProtocolError, RemoteProtocolError

MAX_TEXT = 4_096
"""Characters of a string."""
MAX_ITEMS = 65_536
"""Items of a sequence or a map."""
MAX_FLOAT = 2.0**63
_TYPE = "type"

M = TypeVar("M")


class Codec(Generic[M]):
    """The messages of one channel. ``what``: the name of such a message in errors.

    max_bytes: of a whole message. max_blob_bytes: of a field that is bytes.
    """

    def __init__(
        self, what: str, version: int, kinds: Sequence[type[M]], *, max_bytes: int, max_blob_bytes: int
    ) -> None:
        self._what = what
        self._version = version
        self._max_bytes = max_bytes
        self._max_blob_bytes = max_blob_bytes
        scalars: dict[object, Check] = {**_SCALARS, bytes: _bytes_check(max_blob_bytes)}
        self._kinds = {kind.__name__: kind for kind in kinds}
        self._checks: dict[str, dict[str, Check]] = {}
        for name, kind in self._kinds.items():
            self._checks[name] = _checks_of(kind, scalars)

    def encode(self, message: M, key: bytes) -> bytes:
        """Return the bytes of a message.

        Raises:
            LocalProtocolError: a field is out of bounds, or the whole is too long.
        """
        name = type(message).__name__
        try:
            values = {field: check(getattr(message, field), field) for field, check in self._checks[name].items()}
            body: bytes = bytes([self._version]) + msgpack.packb({_TYPE: name, **values})
        except ValueError as error:
            raise LocalProtocolError(f"{name}: {error}") from None
        if len(body) + TAG_BYTES > self._max_bytes:
            raise LocalProtocolError(f"{name}: {len(body)} bytes; a {self._what} has at most {self._max_bytes}")
        return body + make_tag(key, body)

    def decode(self, data: bytes, key: bytes) -> M:
        """Return the message that ``data`` carries. Fields that this version does not know are ignored.

        Raises:
            RemoteProtocolError: it was not made by a holder of ``key``, or a field is missing or of the wrong type.
        """
        if not 1 + TAG_BYTES < len(data) <= self._max_bytes:
            raise RemoteProtocolError(
                f"{self._what}: {len(data)} bytes; it has more than 17 and at most {self._max_bytes}"
            )
        if data[0] != self._version:
            raise RemoteProtocolError(
                f"{self._what}: version {data[0]} came and this is version {self._version}; "
                "install the same mdiq everywhere"
            )
        body = data[:-TAG_BYTES]
        if not hmac.compare_digest(make_tag(key, body), data[-TAG_BYTES:]):
            raise RemoteProtocolError(f"{self._what}: the tag does not match; the sender has another key")
        values = self._unpack(body[1:])
        name = values.get(_TYPE)
        if not isinstance(name, str) or name not in self._kinds:
            raise RemoteProtocolError(f"{self._what}: its type is missing or unknown")
        try:
            checked = {field: check(values.get(field, MISSING), field) for field, check in self._checks[name].items()}
            return self._kinds[name](**checked)
        except ValueError as error:
            raise RemoteProtocolError(f"{name}: {error}") from None

    def _unpack(self, body: bytes) -> dict[str, object]:
        try:
            values = msgpack.unpackb(
                body,
                strict_map_key=True,
                use_list=False,
                max_str_len=4 * MAX_TEXT,
                max_bin_len=self._max_blob_bytes,
                max_array_len=MAX_ITEMS,
                max_map_len=MAX_ITEMS,
                max_ext_len=0,
            )
        except (ValueError, msgpack.UnpackException) as error:
            raise RemoteProtocolError(f"{self._what}: not msgpack: {type(error).__name__}") from None
        if not isinstance(values, dict):
            raise RemoteProtocolError(f"{self._what}: not a map")
        return values


Check = Callable[[object, str], Any]
"""Returns the value with its annotated type, or raises ValueError with a text that names the field."""


def _check_int(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where} is not an integer")
    if not 0 <= value < 2**64:
        raise ValueError(f"{where} is out of range")
    return int(value)


def _check_float(value: object, where: str) -> float:
    # Squares and sums of what passes are finite still.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -MAX_FLOAT <= value <= MAX_FLOAT:
        raise ValueError(f"{where} is not a number from -2^63 to 2^63")
    return float(value)


def _check_bool(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where} is not true or false")
    return value


def _check_str(value: object, where: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError(f"{where} is not a text of at most {MAX_TEXT} characters")
    return value


def _bytes_check(max_bytes: int) -> Check:
    def check(value: object, where: str) -> bytes:
        if not isinstance(value, bytes) or len(value) > max_bytes:
            raise ValueError(f"{where} is not at most {max_bytes} bytes")
        return value

    return check


_SCALARS: dict[object, Check] = {
    int: _check_int,
    float: _check_float,
    bool: _check_bool,
    str: _check_str,
}


def _checks_of(kind: Any, scalars: Mapping[object, Check]) -> dict[str, Check]:
    """Return the check of each field of a dataclass."""
    hints = get_type_hints(kind)
    return {field.name: _check_of(hints[field.name], scalars) for field in fields(kind)}


def _check_of(annotation: Any, scalars: Mapping[object, Check]) -> Check:
    """Return the check that an annotation calls for."""
    if annotation in scalars:
        return scalars[annotation]
    if is_dataclass(annotation):
        checks = _checks_of(annotation, scalars)
        return lambda value, where: _checked_fields(value, where, annotation, checks)
    items = [_check_of(argument, scalars) for argument in get_args(annotation) if argument is not ...]
    if get_origin(annotation) is Mapping:
        key, item = items
        return lambda value, where: _checked_map(value, where, key, item)
    if ... in get_args(annotation):
        return lambda value, where: _checked_list(value, where, items[0])
    return lambda value, where: _checked_record(value, where, items)


def _checked_map(value: object, where: str, key: Check, item: Check) -> dict[Any, Any]:
    if not isinstance(value, Mapping) or len(value) > MAX_ITEMS:
        raise ValueError(f"{where} is not a map of at most {MAX_ITEMS} items")
    return {key(name, where): item(number, where) for name, number in value.items()}


def _checked_list(value: object, where: str, item: Check) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_ITEMS:
        raise ValueError(f"{where} is not a list of at most {MAX_ITEMS} items")
    return tuple(item(entry, where) for entry in value)


def _checked_fields(value: object, where: str, kind: Any, checks: Mapping[str, Check]) -> Any:
    """Return the map for a dataclass to be sent, or the dataclass for a map that was received."""
    if isinstance(value, kind):
        return {name: check(getattr(value, name), f"{where}.{name}") for name, check in checks.items()}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is not a map")
    return kind(**{name: check(value.get(name, MISSING), f"{where}.{name}") for name, check in checks.items()})


def _checked_record(value: object, where: str, items: list[Check]) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) != len(items):
        raise ValueError(f"{where} is not {len(items)} values")
    return tuple(check(entry, where) for check, entry in zip(items, value, strict=True))
