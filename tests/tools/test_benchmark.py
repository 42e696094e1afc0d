import importlib.util
import json
import re

import numpy as np
import pytest
from PIL import Image

from mimicnorm_jax.tools.benchmark import input as benchmark_input
from mimicnorm_jax.tools.benchmark import step as benchmark_step


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            directory = tmp_path / split / name
            directory.mkdir(parents=True)
            for index in range(6):
                pixels = generator.integers(0, 256, (40, 50, 3), np.uint8)
                Image.fromarray(pixels).save(directory / f"{index}.jpg")
    return tmp_path


@pytest.fixture
def run_benchmark(run_main, tmp_path):
    def run(*arguments):
        return run_main(
            *arguments,
            *("--config.network=resnet8", "--config.width=0.25", "--seconds=0.05"),
            module="mimicnorm_jax.tools.benchmark",
        )

    return run


DIGITS = ("--config=configs/digits_resnet20.py", "--config.batch_size=16")


def test_every_stage_of_encoded_images_is_timed(run_benchmark, folder, tmp_path):
    done = run_benchmark(
        "input",
        *DIGITS,
        "--config.data.name=folder",
        f"--config.data.dir={folder}",
        "--config.data.random_resized_crop=True",
        "--steps=3",
        f"--json={tmp_path / 'input.json'}",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "input.json").read_text())
    stages = report["stages"]
    assert [stage["name"] for stage in stages] == [
        "read",
        "+ decode, random crop, resize",
        "+ order, batch (one thread)",
        "all workers",
        "transfer to the devices",
    ]
    assert all(stage["images_per_second"] > 0 for stage in stages)
    assert stages[0]["images_per_second"] > stages[1]["images_per_second"]
    assert report["training_images_per_second"] > 0
    assert 0 <= report["input_wait_fraction"] <= 1
    for name in (stage["name"] for stage in stages):
        assert name in done.stdout


def test_images_in_memory_need_no_decoding(run_benchmark):
    done = run_benchmark("input", *DIGITS, "--steps=0")
    assert done.returncode == 0, done.stderr
    assert "decode" not in done.stdout and "input_wait_fraction" not in done.stdout
    assert re.search(r"order, batch \(one thread\) +\d{4,}", done.stdout)


def test_a_stage_counts_all_images_and_all_time(monkeypatch):
    """Ten images in half a second of which a fifth is processor time: 20 and 100 a second."""
    clock = {"wall": 0.0, "processor": 0.0}

    def call():
        clock["wall"] += 0.5
        clock["processor"] += 0.1
        return 10

    monkeypatch.setattr(benchmark_input.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(benchmark_input.time, "process_time", lambda: clock["processor"])
    stage = benchmark_input.time_calls("stage", call, seconds=3.0)
    assert stage.images_per_second == pytest.approx(20)
    assert stage.images_per_core_second == pytest.approx(100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (DIGITS, "say which: input"),
        (("output", *DIGITS), "unknown command 'output'; allowed: input"),
        (("input", "step", *DIGITS), "unexpected argument 'step'"),
        (("input", *DIGITS, "--json=no/such/folder.json"), "no/such/folder.json cannot be written"),
    ],
)
def test_a_wrong_command_line_is_one_line(run_benchmark, arguments, message):
    done = run_benchmark(*arguments)
    assert done.returncode == 2, done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert message in line


@pytest.mark.long
def test_the_start_of_a_run_is_timed_with_an_empty_and_a_warm_cache(run_benchmark, tmp_path):
    done = run_benchmark(
        "startup",
        *DIGITS,
        *("--config.data.image_size=8", "--repeats=1", f"--json={tmp_path / 'startup.json'}"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "startup.json").read_text())
    (warm,) = report["warm_s"]
    assert 0 < warm < report["empty_cache_s"]
    assert f"warm: median {warm:.1f} s" in done.stdout


def test_a_run_that_does_not_start_is_one_line(run_benchmark):
    done = run_benchmark("startup", *DIGITS, "--config.data.image_size=8", "--config.num_devices=9")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the training program failed: error: config.num_devices")


def test_the_cost_of_a_checkpoint_is_a_part_of_an_epoch(run_benchmark, tmp_path):
    done = run_benchmark(
        "checkpoint",
        *DIGITS,
        *("--config.data.image_size=8", "--pairs=3", "--steps=5"),
        f"--json={tmp_path / 'cost.json'}",
    )
    assert done.returncode == 0, done.stderr
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert 0 < cost["blocked_s"] < cost["epoch_s"]
    assert cost["share"] == max(cost["blocked_s"], cost["extra_s"]) / cost["epoch_s"]
    assert f"one an epoch costs {100 * cost['share']:.2f} %" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_a_missing_pytorch_is_one_line_before_anything_is_compiled(run_main):
    done = run_main(
        *("step", "--config=configs/cifar100_resnet18.py", "--methods=nonorm,torch:nonorm"),
        module="mimicnorm_jax.tools.benchmark",
    )
    assert done.returncode == 2, done.stdout
    assert not done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: methods that begin with torch: need PyTorch")


class Fake:
    """A step of known duration that notes when it was timed."""

    compile_s, flops = 2.0, 600.0

    def __init__(self, name, step_s, turns):
        self.name, self.step_s, self.turns = name, step_s, turns

    def seconds(self, steps):
        self.turns.append((self.name, steps))
        return steps * self.step_s


def test_methods_take_turns_and_are_compared_within_a_round():
    turns = []
    fakes = [Fake("a", 0.5, turns), Fake("b", 0.25, turns)]
    speeds = benchmark_step.compare(
        ["a", "b"], fakes, [16, 16], rounds=3, seconds=1.0, device_kind="TPU v5 lite"
    )
    assert turns[:2] == [("a", 1), ("b", 1)]  # how long is a step?
    assert turns[2:] == [("a", 2), ("b", 4), ("b", 4), ("a", 2), ("a", 2), ("b", 4)]
    assert [speed.images_per_second for speed in speeds] == [32.0, 64.0]
    assert [speed.ratio for speed in speeds] == [1.0, 2.0]
    assert speeds[1].achieved_flops == 2400.0
    assert speeds[1].of_peak == 2400.0 / 197e12


def test_the_training_step_is_timed_method_by_method(run_benchmark, tmp_path):
    path, picture = tmp_path / "step.json", tmp_path / "step.png"
    done = run_benchmark(
        "step",
        *DIGITS,
        *("--config.data.image_size=8", "--rounds=2", f"--json={path}", f"--plot={picture}"),
        "--methods=batchnorm,mimicnorm:activation_storage=int8",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    first, second = report["methods"]
    assert report["batch"] == 16 and report["precision"] == "float32"
    assert first["method"] == "batchnorm" and first["ratio"] == 1.0
    assert second["method"] == "mimicnorm:activation_storage=int8"
    for row in (first, second):
        assert row["images_per_second"] > 0 and row["compile_s"] > 0 and row["flops"] > 0
        assert row["of_peak"] is None  # nobody knows the peak of this processor
    assert picture.stat().st_size > 5000
