from typing import get_args

import pytest

from mdiq.core.wire_formats import SMALL, USUAL, WIRE_FORMATS, DtypeName, WireName, rounds, row_bytes


def test_the_names_that_files_and_flags_take_are_those_of_the_table() -> None:
    assert get_args(WireName) == tuple(WIRE_FORMATS)
    assert {USUAL, SMALL, *get_args(DtypeName)} <= WIRE_FORMATS.keys()
    assert len({wire.code for wire in WIRE_FORMATS.values()} - {0}) == len(WIRE_FORMATS)


@pytest.mark.parametrize(("wire", "dtype"), [("bf16", "f32"), ("i8", "f32"), ("i8", "bf16")])
def test_a_format_that_holds_less_of_a_number_rounds(wire: str, dtype: str) -> None:
    assert (rounds(wire, dtype), rounds(dtype, wire), rounds(wire, wire)) == (True, False, False)


@pytest.mark.parametrize(("wire", "expected"), [("f32", 40), ("bf16", 20), ("i8", 14)])
def test_a_row_has_its_numbers_and_a_packed_one_its_scale(wire: str, expected: int) -> None:
    assert row_bytes(wire, 10) == expected
