"""Killed runs end with the bits of the run that was not: the short version of the harness."""

import pytest

from tests.chaos.harness import run_chaos


@pytest.mark.parametrize("network", ["mlp", pytest.param("resnet8", marks=pytest.mark.long)])
def test_runs_killed_at_random_moments_lose_nothing_but_time(network, tmp_path):
    lines = []
    reports = run_chaos(
        tmp_path,
        sigkills=2,
        others=["sigterm", "sighup", "full"],
        during_save=0,
        epochs=4.0,
        network=network,
        seed=None,
        say=lines.append,
    )
    for count, report in enumerate(reports, start=1):
        assert report["processes"] == count
        assert report["sigkill"] == 1, lines
        assert report["resumes"] >= 2, lines
        assert report["mismatches"] == report["processes_left"] == 0, lines
        assert report["most_steps_lost_by_a_stop"] == 0, lines
        # a checkpoint every 5 steps; one may be under way, and a slow disk delays the next
        assert report["most_steps_lost_by_sigkill"] <= 12, lines
        assert report["slowest_stop_s"] < 20, lines
    one, two = reports
    assert (one["sigterm"], one["full"], two["sighup"]) == (1, 1, 1), lines
