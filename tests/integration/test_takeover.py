"""Real processes: a node that is killed while it answers, and a spare or the nodes beside it go on with the same text.

tests/faults has many more moments, and its own tox environment.
"""

from pathlib import Path

import pytest

from tests.faults.conftest import SMALL, model_that_is_here
from tests.faults.matrix import Matrix, lab_of
from tests.faults.points import SPARE, SURVIVORS, quick_points_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.mark.parametrize("arrangement", [SPARE, SURVIVORS])
def test_others_take_over_from_a_node_that_is_killed_and_every_answer_is_the_same(
    arrangement: str, tmp_path: Path
) -> None:
    point = next(point for point in quick_points_of(arrangement) if point.phase == "decode")
    with lab_of(arrangement, tmp_path, model_that_is_here(SMALL)) as lab:
        matrix = Matrix(lab, arrangement)
        matrix.run_calmly()
        played = matrix.play(point)
        assert (played.missed, played.troubles, played.is_formed_anew) == ("", [], False)
        assert played.pauses and played.num_running > 3, "hardly any answer ran when the node was killed"
