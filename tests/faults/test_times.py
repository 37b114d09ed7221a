"""The times of a pause, printed as medians and kept as a receipt; that the answers are right is what is tested.

With MDIQ_FAULTS=times (or all): ten kills for each arrangement, with the 0.5B model; else three, with the small one.
"""

from pathlib import Path

import pytest

from tests.faults.conftest import HALF_B, SMALL, model_that_is_here
from tests.faults.matrix import lab_of
from tests.faults.points import SPARE, SURVIVORS, words_of_environment
from tests.faults.times import measure_times, write_times

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("arrangement", [SPARE, SURVIVORS])
def test_a_client_waits_for_noticing_loading_and_the_replay(arrangement: str, tmp_path: Path) -> None:
    is_whole = not {"times", "all"}.isdisjoint(words_of_environment())
    with lab_of(arrangement, tmp_path, model_that_is_here(HALF_B if is_whole else SMALL)) as lab:
        times = measure_times(lab, 10 if is_whole else 3)
        path = write_times(lab, arrangement, times, tmp_path)
    print(f"\n{arrangement}, {times.prompt_tokens} tokens of prompt: {times.medians()}\n{path}")  # noqa: T201
    assert not times.troubles, "\n".join(times.troubles)
    assert len(times.noticed) == len(times.gap) == len(times.replayed)
