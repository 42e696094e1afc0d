"""The wheel, installed where there is no checkout, trains."""

import os
import subprocess
import sys
import zipfile

import pytest

from .conftest import ROOT

CONFIGS = {path.name for path in (ROOT / "configs").glob("*.py")}


def run(*command, cwd, **environment):
    env = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def wheel(tmp_path):
    """Built from what git tracks, as a clean clone has it."""
    source = tmp_path / "source"
    names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", tmp_path)
    run(*map(str, pip), str(source), cwd=tmp_path)
    (path,) = tmp_path.glob("*.whl")
    return path


@pytest.mark.long
def test_the_wheel_has_every_package_and_config_and_trains_by_name(wheel, tmp_path):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"mimicnorm_jax/configs/{name}" for name in CONFIGS} <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mimicnorm_jax").rglob("*.py")}
    assert len(modules) > 100 and modules <= names
    assert not any(name.startswith(("tests", "configs", "launch")) for name in names)
    installed = tmp_path / "installed"
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", installed)
    run(*map(str, pip), str(wheel), cwd=tmp_path)
    script = "import mimicnorm_jax; print(mimicnorm_jax.__file__)"
    elsewhere = {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    found = run(sys.executable, "-c", script, cwd=tmp_path, **elsewhere)
    assert found.startswith(str(installed))
    main = (sys.executable, "-m", "mimicnorm_jax.main", "--config=digits_resnet20")
    output = run(*main, "--config.max_steps=3", cwd=tmp_path, **elsewhere)
    assert "after 3 steps" in output
    assert (tmp_path / "runs" / "digits_resnet20-mimicnorm-s0" / "summary.json").exists()
