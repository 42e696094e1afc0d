"""Wrong arguments of the scripts in ``launch/`` are said in a line."""

import os
import subprocess

import pytest

from tests.runs import ROOT


@pytest.mark.parametrize(
    ("command", "environment", "said"),
    [
        (["local.sh"], {}, "error: N= is no whole number from 1 to 9999, so nothing was run"),
        (["local.sh", "0"], {}, "error: N=0 is no whole number"),
        (["local.sh", "two"], {}, "error: N=two is no whole number"),
        (["local.sh", "--config=x"], {}, "error: N=--config=x is no whole number"),
        (["local.sh", "9" * 20], {}, "is no whole number"),
        (["local.sh", "2"], {"DEVICES": "-1"}, "error: DEVICES=-1 is no whole number"),
        (["tpu_vm.sh"], {}, "error: nothing is none of create, queue, setup"),
        (["tpu_vm.sh", "--dry-run", "trian"], {}, "error: trian is none of create, queue, setup"),
        (["tpu_vm.sh", "train"], {"TPU_WORKERS": "all"}, "error: TPU_WORKERS=all is no whole"),
    ],
)
def test_wrong_arguments_are_said_in_a_line(command, environment, said):
    done = subprocess.run(
        ["bash", f"launch/{command[0]}", *command[1:]],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and said in done.stderr
