"""The steps of a pause, as an operator reads them."""

from mdiq.runtime.recovery_times import STEPS, RecoveryTimes


def test_each_step_counts_from_when_the_loss_was_noticed() -> None:
    times = RecoveryTimes("pi1: it is gone", 100.0, unheard_s=0.75, back_s=100.5, loaded_s=101.25)
    times.begun([3, 5, 8], 101.5)
    assert not times.went_on(9, 101.6, has_token=True)  # it came in the pause
    assert not times.went_on(5, 101.7, has_token=False)  # its client has left
    assert not times.went_on(3, 102.0, has_token=True)
    assert not times.went_on(3, 102.1, has_token=True)
    assert times.went_on(8, 103.0, has_token=True)
    assert not times.went_on(8, 103.5, has_token=True)
    assert times.shown() == {
        "unheard_s": 0.75,
        "back_s": 0.5,
        "loaded_s": 1.25,
        "after_s": 1.5,
        "first_token_s": 2.0,
        "replayed_s": 3.0,
        "sequences": 3,
    }
    assert {*STEPS} == {*times.shown()} - {"sequences"}


def test_a_pause_in_which_nothing_ran_has_replayed_when_it_ends() -> None:
    times = RecoveryTimes("pi1: it is gone", 1.0, layers="desk 3, pi2 3")
    times.begun([], 2.0)
    assert times.shown() == {"after_s": 1.0, "replayed_s": 1.0, "sequences": 0, "layers": "desk 3, pi2 3"}
