"""The largest batch that fits."""

import json

import pytest

from mimicnorm_jax.tools.memory.batch import largest_batch, parse_bytes

PEAKS = {
    "line": lambda batch: 60 + 5 * batch,
    "stairs": lambda batch: 60 + 5 * 128 * -(-batch // 128),
    "bent": lambda batch: 60 + 5 * batch + (batch // 100) * 7 + batch**1.2,
}


@pytest.mark.parametrize("start", [8, 64, 4096])
@pytest.mark.parametrize("limit", [99, 100, 1000, 12_345, 10**6])
@pytest.mark.parametrize("form", PEAKS)
def test_the_largest_batch_fits_and_the_next_does_not(form, limit, start):
    asked = []

    def peak(batch):
        asked.append(batch)
        return PEAKS[form](batch)

    batch, bytes_ = largest_batch(peak, limit, multiple=8, start=start)
    assert batch % 8 == 0
    assert bytes_ == (PEAKS[form](batch) if batch else 0) <= limit
    assert PEAKS[form](batch + 8) > limit
    assert len(asked) < 32
    assert max(asked) <= max(start, 2 * batch + 8)


def test_the_search_ends_where_everything_fits():
    assert largest_batch(lambda batch: 7, 10, multiple=1, start=64) == (2**20, 7)


def test_sizes_are_read_with_their_unit():
    assert parse_bytes("16GiB") == 16 * 2**30
    assert parse_bytes("1.5 GB") == 1_500_000_000


def test_the_report_says_which_batch_fits_and_what_it_takes(run_main, tmp_path):
    path = tmp_path / "largest.json"
    config = ("--config=configs/digits_resnet20.py", "--config.network=mlp", "--batch=1280")
    flags = ("--methods=mimicnorm", "--max-batch", f"--json={path}")
    memory = {"module": "mimicnorm_jax.tools.memory", "XDG_CACHE_HOME": tmp_path}
    done = run_main(*config, *flags, "--hbm=8MiB", **memory)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(path.read_text())
    batch, peak = found["batch"], found["peak_bytes"]
    assert found["method"] == "mimicnorm" and batch > 1000 and batch % 8 == 0
    assert 0.99 * 8 * 2**20 < peak <= 8 * 2**20
    *asked, last = done.stdout.splitlines()[2:-1]
    assert last == f"mimicnorm: {batch}"
    assert f"  mimicnorm, batch {batch}: {peak / 2**20:.0f} MiB" in asked
    done = run_main(*config, *flags, "--hbm=0.01MiB", **memory)
    assert done.returncode == 0 and "mimicnorm: not even 8" in done.stdout
