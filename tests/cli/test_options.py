from typing import get_args

from mdiq.cli.options import Dtype, Weights
from mdiq.core.types import WeightFormat
from mdiq.core.wire_formats import DtypeName


def test_flags_take_what_topologies_take() -> None:
    assert tuple(Weights) == get_args(WeightFormat)
    assert tuple(Dtype) == get_args(DtypeName)
