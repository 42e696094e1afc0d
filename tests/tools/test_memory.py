"""The memory report, and what must not grow."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.recipes import cifar100
from mimicnorm_jax.tools.memory import compiled, tables
from mimicnorm_jax.tools.memory.tables import PLAIN, TABLES, TPU, Job, as_markdown, jobs_of
from mimicnorm_jax.tools.memory.targets import mesh_of
from mimicnorm_jax.tools.variants import parse_variants
from tests.conftest import ROOT

DIGITS = ("--config=configs/digits_resnet20.py", "--config.network=resnet8", "--batch=16")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Of this file, whose tests ask for some programs more than once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def run_memory(run_main):
    def run(*arguments, **environment):
        return run_main(*arguments, module="mimicnorm_jax.tools.memory", **environment)

    return run


def rows_of(network, labels, *, width=0.25, batch=32):
    config = cifar100()
    config.update(network=network, width=width, batch_size=batch)
    mesh = mesh_of("cpu", 1)
    return {v.label: compiled.analyse(v, "cpu", mesh) for v in parse_variants(config, labels)}


@pytest.mark.parametrize(
    ("network", "width"),
    [
        ("resnet8", 1),
        pytest.param("vgg11", 0.25, marks=pytest.mark.long),
        pytest.param("squeezenet", 0.5, marks=pytest.mark.long),
    ],
)
def test_mimicnorm_costs_no_more_memory_than_no_normalization(network, width):
    """And BatchNorm here no more than with Flax's own layers."""
    labels = ("batchnorm", "mimicnorm", "nonorm", PLAIN)
    labels = labels if network == "resnet8" else labels[1:3]
    rows = rows_of(network, labels, width=width, batch=64)
    peak = {label: row.peak_bytes for label, row in rows.items()}
    assert peak["mimicnorm"] <= 1.02 * peak["nonorm"]
    if network == "resnet8":
        assert peak["batchnorm"] <= 1.005 * peak[PLAIN]
        assert peak["mimicnorm"] <= 0.8 * peak[PLAIN]


def test_codes_and_micro_batches_save_memory():
    int8, int4 = (f"mimicnorm:activation_storage={name}" for name in ("int8", "int4"))
    parts = "mimicnorm:micro_batches=4"
    rows = rows_of("resnet8", ("mimicnorm", int8, int4, parts), width=1, batch=64)
    kept = {label: row.activation_bytes for label, row in rows.items()}
    assert kept[int8] < 0.9 * kept["mimicnorm"]
    assert kept[int4] < kept[int8]
    assert kept[parts] < 0.6 * kept["mimicnorm"]


def test_a_report_has_a_row_for_each_method(run_memory, tmp_path):
    path, picture = tmp_path / "memory.json", tmp_path / "memory.png"
    methods = "--methods=batchnorm,mimicnorm:remat=block,plain"
    done = run_memory(*DIGITS, methods, f"--json={path}", f"--plot={picture}")
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    assert [row["method"] for row in rows] == ["batchnorm", "mimicnorm:remat=block", "plain"]
    for row in rows:
        assert row["batch"] == 16 and row["target"] == "cpu" and row["precision"] == "float32"
        batch_bytes = 16 * (16 * 16 + 4)  # uint8 images of 16 pixels, int32 labels
        assert row["argument_bytes"] == row["state_bytes"] + batch_bytes
        assert row["peak_bytes"] == row["argument_bytes"] + row["activation_bytes"]
        assert row["temp_bytes"] > 0 and row["flops"] > 0 and row["bytes_accessed"] > 0
        assert row["allocator_peak_bytes"] is None  # XLA's CPU backend counts nothing
    assert "batchnorm" in done.stdout and "1.000" in done.stdout
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target=cuda",), "--target=cuda is unknown; allowed: cpu, gpu, tpu, or what need not"),
        (("--target=gpu",), "--target=gpu: there is none here"),
        (("--methods=mimicnorm:remat=al",), "unknown config.remat 'al'"),
        (("--methods=mimicnorm:rema=block",), "unknown field in --methods=mimicnorm:rema=block:"),
        (("--methods=mimicnorm:epochs=x",), "epochs=x sets no float"),
        (("--methods=plain:method=fixup",), "unknown field in --methods=plain:method=fixup:"),
        (("--methods=plain:activation_storage=int8",), "keep their inputs as they are"),
        (("--methods=",), "--methods= is empty"),
        (("--methods=batchnrm",), "unknown --methods 'batchnrm' (did you mean 'batchnorm'?)"),
        (("--methods=batchnorm:micro_batches=2",), "normalize over the batch"),
        (("--max-batch",), "--max-batch and --hbm go together"),
        (("--max-batch", "--hbm=16"), "--hbm='16' is no size such as 16GiB"),
        (("--max-batch", "--hbm=0GiB"), "--hbm='0GiB' is no size such as 16GiB"),
        (("--config.data.name=folder", "--config.data.dir=x"), "give --num-classes"),
        (("--config.num_devices=3",), "config.num_devices = 3, but cpu has only 1"),
    ],
)
def test_a_wrong_command_line_is_one_line(run_memory, arguments, message):
    done = run_memory(*DIGITS, *arguments)
    assert done.returncode == 2, done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert message in line


@pytest.mark.parametrize("flag", ["--config=configs/digits_resnet20.py", "--batch=8"])
def test_a_table_takes_no_config(run_memory, flag):
    done = run_memory("table1", flag)
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: table1 takes no {flag.partition('=')[0]}"


def test_a_topology_needs_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs libtpu: pip install 'mimicnorm-jax"):
        mesh_of("tpu:v5e:2x2", 1)


def test_a_gpu_that_is_not_here_needs_the_plugin(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps jax-cuda12-plugin==[\d.]+ "):
        mesh_of("gpu:h100", 1)
    with pytest.raises(UserError, match="gpu:h9 is unknown; allowed: h100"):
        mesh_of("gpu:h9", 1)
    for target in ("gpu:", "cpu:x", "npu"):
        with pytest.raises(UserError, match=f"--target={target} is unknown"):
            mesh_of(target, 1)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="JAX's plugin for CUDA is missing"
)
def test_a_gpu_that_is_not_here_keeps_each_activation_once(run_memory, tmp_path):
    path = tmp_path / "gpu.json"
    flags = ("--target=gpu:h100", "--methods=batchnorm,mimicnorm", f"--json={path}")
    done = run_memory(*DIGITS, "--batch=256", *flags)
    assert done.returncode == 0, done.stderr
    batchnorm, mimicnorm = json.loads(path.read_text())
    assert mimicnorm["peak_bytes"] < 0.65 * batchnorm["peak_bytes"]


def test_what_libtpu_says_becomes_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    said = {
        "v9:2x2": ("Invalid TPU external name: TPU v9\nmore", "is no topology that libtpu can"),
        "v5e:2x2": ("The TPU is already in use by process 7", "another process holds /tmp/libtpu"),
    }
    for topology, (message, expected) in said.items():

        def fail(*_, message=message):
            raise RuntimeError(message)

        monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", fail)
        with pytest.raises(UserError, match=expected) as error:
            mesh_of(f"tpu:{topology}", 1)
        assert "\n" not in str(error.value)


def test_what_the_plugin_for_cuda_says_becomes_one_line(monkeypatch):
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # as mesh_of sets it
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def fail(**asked):
        assert asked["platform"] == "cuda"
        raise RuntimeError("no such client\nmore")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", fail)
    with pytest.raises(UserError, match=r"^--target=gpu:h100: no such client$"):
        mesh_of("gpu:h100", 1)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the extra tpu is missing")
def test_a_step_compiles_for_a_tpu_that_is_not_here(run_memory, tmp_path):
    path = tmp_path / "tpu.json"
    methods = "--methods=mimicnorm"
    done = run_memory(
        *DIGITS, "--target=tpu:v5e:2x2", methods, f"--json={path}", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())
    assert row["num_devices"] == 4 and row["precision"] == "bfloat16"
    assert row["roofline_s"] > 0 and row["peak_bytes"] > row["argument_bytes"]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the extra tpu is missing")
def test_more_micro_batches_need_the_memory_of_their_images_alone(run_memory, tmp_path):
    path = tmp_path / "tpu.json"
    few, many = (f"mimicnorm:batch_size={256 * k}:micro_batches={k}" for k in (2, 32))
    done = run_memory(
        *("--config=configs/cifar100_vgg11.py", "--config.width=0.25", "--config.num_devices=1"),
        *("--target=tpu:v5e:2x2", f"--methods={few},{many}", f"--json={path}"),
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    images, peak = (rows[1][name] - rows[0][name] for name in ("argument_bytes", "peak_bytes"))
    assert images == 30 * 256 * 32 * 32 * 3 + 30 * 256 * 4
    assert peak < 1.1 * images  # a copy of them in the layout of convolutions would double it


def test_what_was_compiled_is_not_compiled_again(monkeypatch):
    (first,) = rows_of("mlp", ["mimicnorm"], batch=8).values()
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled again"))
    (again,) = rows_of("mlp", ["mimicnorm"], batch=8).values()
    assert first == again
    with pytest.raises(pytest.fail.Exception):  # another program
        rows_of("mlp", ["nonorm"], batch=8)


@pytest.mark.parametrize(
    ("network", "width", "storage"),
    [
        ("resnet8", 2, "int8"),
        ("resnet8", 2, "int4"),
        ("vgg11", 1, "int8"),
    ],
)
@pytest.mark.long
def test_micro_batches_cost_a_pass_forward_and_codes_nothing(network, width, storage):
    """As counted for a device with loops: a CPU's algorithms with fewer products do not show."""
    config = cifar100()
    config.update(network=network, width=width, batch_size=64)
    labels = ("", ":micro_batches=4", f":activation_storage={storage}")
    variants = parse_variants(config, [f"mimicnorm{label}" for label in labels])
    whole, in_parts, codes = (compiled.unoptimized_flops(variant) for variant in variants)
    assert whole == pytest.approx(3 * (in_parts - whole), rel=0.01)
    assert codes == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize(
    ("platform", "parts", "counted"),
    [("cpu", 1, True), ("cpu", 4, True), ("tpu", 1, True), ("tpu", 4, False), ("gpu", 1, False)],
)
def test_work_that_the_compiler_does_not_see_is_counted_before_it(platform, parts, counted):
    config = cifar100()
    config.micro_batches = parts
    assert compiled.is_counted(config, platform) == counted


def test_uncounted_work_is_that_of_the_program(monkeypatch):
    (seen,) = rows_of("mlp", ["mimicnorm"], batch=8).values()
    monkeypatch.setattr(compiled, "is_counted", lambda *_: False)
    (unseen,) = rows_of("mlp", ["mimicnorm"], batch=8).values()
    assert unseen.flops == pytest.approx(seen.flops, rel=0.1)
    assert unseen.bytes_accessed is None and unseen.roofline_s is None


def test_a_program_is_known_by_what_its_own_platform_computes():
    def step_with(**forms):
        def step(x):
            for _ in range(2):  # JAX numbers functions also through these
                x = lax.platform_dependent(x, **forms) if len(forms) > 1 else forms["default"](x)
                x = x + jnp.where(x[:1] > 0, x[:1], 2)
            return jnp.where(x > 0, x, 2), jnp.where(x[0] > 0, x[0], 3)

        lowered = jax.jit(step).lower(jax.ShapeDtypeStruct((4, 4), jnp.float32))
        return lowered.as_text(), compiled._digest(lowered, "cpu")

    def another(x):
        return jnp.where(x[:2] > 0, x[:2], 1).T @ x[:2]

    text, digest = step_with(default=jnp.sin)
    text_for_tpus, digest_for_tpus = step_with(tpu=another, default=jnp.sin)
    assert text != text_for_tpus
    assert digest == digest_for_tpus
    assert digest != step_with(cpu=another, default=jnp.sin)[1]


def test_a_table_has_the_papers_saving_beside_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    sizes = iter([100, 60, 61, 110])
    monkeypatch.setattr(
        compiled,
        "_compile",
        lambda *_: (
            {"peak": 2**20 * next(sizes), "arguments": 7, "temp": 8}
            | {"flops": 9.0, "bytes_accessed": 10.0, "seconds": 11.0}
        ),
    )
    load = tables._load

    def load_one_that_is_quickly_traced(name):
        config = load(name)
        config.network = "mlp"
        return config

    monkeypatch.setattr(tables, "_load", load_one_that_is_quickly_traced)
    entry = TABLES["table1"][0]._replace(batch=4, more=())
    monkeypatch.setitem(TABLES, "table1", (entry,))
    jobs = [job for job in jobs_of("table1") if job.target == "cpu"]
    assert {job.method for job in jobs} == {"batchnorm", "mimicnorm", "nonorm", PLAIN}
    monkeypatch.setattr(tables, "jobs_of", lambda table: jobs)
    tables.write_table("table1", processes=1)
    records = json.loads((tmp_path / "table1.json").read_text())
    assert [record["config"] for record in records] == ["cifar100_vgg11"] * 4
    text = (tmp_path / "table1.md").read_text()
    line = "| cifar100_vgg11, 4 | 100 | 60 | 61 | 110 | 40.0 % | 39.0 % | 4.0 % |"
    assert line in text.splitlines()  # the paper's: 1 - 2851/2971
    # and from the file, in place of compiling, on another machine
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled again"))
    tables.write_table("table1", processes=1)
    assert json.loads((tmp_path / "table1.json").read_text()) == records


def test_an_interrupted_table_keeps_what_the_file_had(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (row,) = rows_of("mlp", ["batchnorm"], batch=4).values()
    others = [{"config": "other", **dataclasses.asdict(row), "program": str(i)} for i in range(3)]
    (tmp_path / "table1.json").write_text(json.dumps(others))
    done = [row]

    def compile_job(job, known):
        if not done:
            raise KeyboardInterrupt
        return done.pop()

    monkeypatch.setattr(tables, "compile_job", compile_job)
    with pytest.raises(KeyboardInterrupt):
        tables.write_table("table1", processes=1)
    programs = [r["program"] for r in json.loads((tmp_path / "table1.json").read_text())]
    assert programs == [row.program, "0", "1", "2"]


def test_the_markdown_of_an_unfinished_table_leaves_out_what_is_missing():
    (row,) = rows_of("mlp", ["batchnorm"], batch=4).values()
    job = Job("cifar100_vgg11", 256, "batchnorm", TPU)
    text = as_markdown("table1", {job: dataclasses.replace(row, target=TPU)})
    (line,) = (line for line in text.splitlines() if "cifar100_vgg11" in line)
    assert line.count("|") == 9
