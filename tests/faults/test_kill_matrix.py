"""Nodes are killed at many moments of running answers, and each answer is that of a calm run of the same ring.

MDIQ_FAULTS chooses the points: see wanted_points. The receipt goes to $MDIQ_RECEIPTS, or to the test's folder.
"""

from collections.abc import Iterator

import pytest

from tests.faults.conftest import HALF_B, SMALL, model_that_is_here
from tests.faults.matrix import Matrix, lab_of
from tests.faults.points import RESTART, Point, wanted_points, words_of_environment

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    words = words_of_environment()
    models = [SMALL, HALF_B] if words and "quick" not in words else [SMALL]
    cases = [
        pytest.param((model, arrangement), point, id=f"{model}-{arrangement}-{point}")
        for model in models
        for arrangement, points in wanted_points(words).items()
        for point in points
    ]
    metafunc.parametrize(("matrix", "point"), cases, indirect=["matrix"], scope="module")


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    """A ring that has answered calmly; it serves for all points of its arrangement."""
    model, arrangement = request.param
    folder = tmp_path_factory.mktemp("matrix")
    with lab_of(arrangement, folder, model_that_is_here(model)) as lab:
        matrix = Matrix(lab, arrangement)
        matrix.run_calmly()
        yield matrix
        path = matrix.write(folder)
    print(f"\n{path}: {matrix.counts()}")  # noqa: T201


def test_after_a_kill_every_answer_is_that_of_a_calm_run(matrix: Matrix, point: Point) -> None:
    played = matrix.play(point)
    assert not played.missed, f"the point says nothing, since a kill had no moment: {played.missed}"
    assert not played.troubles, "\n".join(played.troubles)
    if matrix.arrangement == RESTART:
        assert not played.is_formed_anew, "the node came back, and the ring did not go on with it"
