"""What a run records of how it was made."""

import importlib.metadata
import json
import os
import subprocess

import jax
import pytest

from mimicnorm_jax.config import FREE_FIELDS
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.train import provenance
from mimicnorm_jax.train.loop import train
from mimicnorm_jax.train.provenance import code, config_as_json, config_digest
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.train.workdir import saved_config


def test_the_summary_records_what_a_run_was_made_with(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "code", lambda: {"git_commit": "c0ffee", "git_dirty": True})
    config = tiny_config(network="mlp", max_steps=1)
    train(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["git_commit"], summary["git_dirty"]) == ("c0ffee", True)
    assert summary["xla_flags"] == os.environ["XLA_FLAGS"] != ""
    assert summary["versions"]["jax"] == summary["jax_version"] == jax.__version__
    for package in ("jaxlib", "flax", "optax", "orbax-checkpoint"):
        assert summary["versions"][package] == importlib.metadata.version(package)
    assert summary["config"] == config_as_json(config)
    assert summary["config_sha256"] == config_digest(config_as_json(config))


def test_the_digest_of_a_configuration_changes_with_what_is_computed_alone(tiny_config):
    fields = config_as_json(tiny_config())
    free = dict.fromkeys(FREE_FIELDS, "other")
    assert config_digest(fields | free) == config_digest(fields)
    for name in fields.keys() - set(FREE_FIELDS):
        assert config_digest(fields | {name: "other"}) != config_digest(fields), name


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository that seems to hold the package; a function that runs git in it."""
    package = tmp_path / "checkout" / "mimicnorm_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(provenance, "__file__", str(package / "train" / "provenance.py"))

    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        command = ["git", *identity, *arguments]
        done = subprocess.run(command, cwd=package, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "--quiet", "..")
    return git, package


def test_the_commit_and_whether_files_were_changed_since(checkout):
    git, package = checkout
    assert code() == {"git_commit": None, "git_dirty": None}  # the package is not part of it
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    commit = git("rev-parse", "HEAD")
    assert code() == {"git_commit": commit, "git_dirty": False}
    (package / "__init__.py").write_text("1 + 1\n")
    assert code() == {"git_commit": commit, "git_dirty": True}


class TestMachine:
    def test_what_decides_bits_on_cpus_is_recorded(self, tiny_config, monkeypatch):
        mesh = set_up(tiny_config(network="mlp")).mesh
        found = provenance.hardware(mesh)
        assert found["processor"] and found["instructions"] and found["threads"] >= 1
        assert found["jaxlib_version"] == importlib.metadata.version("jaxlib")
        monkeypatch.setenv("NPROC", "3")
        assert provenance.hardware(mesh) == found | {"threads": 3}

    def test_differences_in_words(self):
        before = {"threads": 2, "xla_flags": "", "num_devices": 1}
        now = {"threads": 8, "xla_flags": "--a", "num_devices": 1, "instructions": "avx2"}
        assert provenance.differences(before, now) == [
            "threads 2, now 8",
            "xla flags none, now --a",
        ]

    def test_a_moved_run_says_so_or_refuses(self, tiny_config, tmp_path, monkeypatch, capsys):
        config = tiny_config(network="mlp", max_steps=2)
        train(config, tmp_path / "run")
        monkeypatch.setenv("NPROC", "77")
        strict = tiny_config(network="mlp", max_steps=3, require_same_machine=True)
        with pytest.raises(
            UserError, match=r"a run that computed otherwise: .*threads \d+, now 77"
        ):
            train(strict, tmp_path / "run")
        capsys.readouterr()
        train(tiny_config(network="mlp", max_steps=3), tmp_path / "run")
        said = capsys.readouterr().out
        assert (
            "now 77 (config.cpu_threads sets them)): the bits may differ from those of a run that"
            in said
        )
        monkeypatch.delenv("NPROC")
        train(tiny_config(network="mlp", max_steps=4), tmp_path / "run")
        capsys.readouterr()
        train(tiny_config(network="mlp", max_steps=5, require_same_machine=True), tmp_path / "run")
        assert "the bits may differ" not in capsys.readouterr().out

    def test_since_when_a_run_computes_here_is_kept(self, tiny_config, tmp_path, monkeypatch):
        for steps, threads, since in ((2, "7", 0), (4, "9", 2), (6, "9", 2)):
            monkeypatch.setenv("NPROC", threads)
            train(tiny_config(network="mlp", max_steps=steps), tmp_path / "run")
            checkpoint = tmp_path / "run" / "checkpoints" / str(steps)
            progress = json.loads((checkpoint / "progress" / "metadata").read_text())
            assert progress["hardware_since"] == since

    def test_a_configuration_that_was_edited_is_noticed(self, tiny_config, tmp_path, capsys):
        folder = tmp_path / "run"
        train(tiny_config(network="mlp", max_steps=2), folder)
        config = saved_config(folder)
        config.max_steps = 3
        train(config, folder)
        assert "config.json is not what this checkpoint" not in capsys.readouterr().out
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | {"learning_rate": 0.01}))
        config = saved_config(folder)
        config.max_steps = 4
        train(config, folder)
        assert "WARNING: config.json is not what this checkpoint" in capsys.readouterr().out
