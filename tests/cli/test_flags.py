"""Flags whose values are texts with commas between."""

import pytest

from mdiq.cli.flags import parse_wires
from mdiq.errors import ConfigError


def test_one_format_serves_all_hops_and_a_list_each() -> None:
    assert parse_wires("i8", 3) == ("i8",)
    assert parse_wires("bf16,i8,f32", 3) == ("bf16", "i8", "f32")
    assert parse_wires("bf16", 1) == ("bf16",)
    assert parse_wires("auto", 2) == ("auto",)
    assert parse_wires("auto,i8", 2) == ("auto", "i8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a format; use one of f32, bf16, i8, auto"),
        ("int8", "'int8' is not a format"),
        ("bf16,", "'' is not a format"),
        ("bf16,i8", "2 formats for 3 hops; give one, or one for each"),
    ],
)
def test_other_formats_and_numbers_of_them_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"--wire {text}: {message}"):
        parse_wires(text, 3)
