import pytest

from mimicnorm_jax.layers import last_bn_loss_floor
from mimicnorm_jax.tools.loss_floor import floors


def test_floors_fall_with_the_batch_to_that_of_equal_counts():
    found = floors([10, 100], [2, 32, 100_000])
    assert (found[:-1] > found[1:]).all()
    for column, classes in enumerate((10, 100)):
        assert found[-1, column] == pytest.approx(last_bn_loss_floor([1] * classes), abs=1e-3)


def test_a_table_and_a_picture(run_main, tmp_path):
    done = run_main(
        *("--classes=2,10", "--batches=32,2", f"--plot={tmp_path / 'floor.png'}"),
        module="mimicnorm_jax.tools.loss_floor",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "| batch | 2 classes | 10 classes |"
    assert [line.split()[1] for line in lines[2:4]] == ["2", "32"]
    assert (tmp_path / "floor.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--classes=1,10", "--classes=1,10 are no numbers from 2 to 1000000"),
        ("--batches=few", "--batches=few are no numbers from 1 to 1000000"),
        ("--label_smoothing=1", "--label_smoothing=1 is not from 0 to below 1"),
        ("--plot=floor.txt", "does not end in .png or"),
    ],
)
def test_wrong_arguments_get_one_line(argument, message, run_main):
    done = run_main(argument, module="mimicnorm_jax.tools.loss_floor")
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.count("\n") == 1
