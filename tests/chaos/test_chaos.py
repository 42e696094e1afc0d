"""Killed runs end with the bits of the run that was not: the short version of the harness."""

import pytest

from tests.chaos.harness import run_chaos


@pytest.mark.parametrize("network", ["mlp", pytest.param("resnet8", marks=pytest.mark.long)])
def test_runs_killed_at_random_moments_lose_nothing_but_time(network, tmp_path):
    lines = []
    reports = run_chaos(
        tmp_path,
        sigkills=2,
        sigterms=2,
        during_save=2,
        epochs=4.0,
        network=network,
        seed=None,
        say=lines.append,
    )
    for count, report in enumerate(reports, start=1):
        assert report["processes"] == count
        assert (report["sigkills"], report["sigterms"], report["resumes"]) == (1, 1, 2), lines
        assert report["mismatches"] == 0, lines
        assert report["most_steps_lost_by_sigterm"] == 0, lines
        # a checkpoint every 5 steps; one may be under way, and a slow disk delays the next
        assert report["most_steps_lost_by_sigkill"] <= 12, lines
        assert report["slowest_stop_s"] < 20, lines
