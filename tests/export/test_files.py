"""What the exports have in common, StableHLO and safetensors; ONNX has a file of its own."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from safetensors.numpy import load_file, save_file

import mimicnorm_jax
from mimicnorm_jax import create_model
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.export import About, export_safetensors, export_stablehlo, load_safetensors
from mimicnorm_jax.export.prepared import check_agreement, prepare

ABOUT = About(
    classes=tuple("abcdefg"), temperature=0.5, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), resize=20
)


def pixels(count=4, size=16):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def normalized(images, mean=ABOUT.mean, std=ABOUT.std):
    return ((images / 255 - np.array(mean)) / np.array(std)).astype(np.float32)


def perturbed(model):
    """Every array moved a little: zeros and ones would hide what is left out."""
    random = np.random.default_rng(0)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and jnp.issubdtype(node[...].dtype, jnp.floating):
            noise = random.uniform(0.05, 0.15, node[...].shape)
            node[...] = node[...] + jnp.asarray(noise * (np.abs(node[...]) + 0.1), node.dtype)
    return model


def model_of(name="resnet8", method="mimicnorm", size=16, **options):
    width = {} if name == "mlp" else {"width": 0.5}
    common = {"num_classes": 7, "image_size": size, "rngs": nnx.Rngs(0)}
    return perturbed(create_model(name, method=method, **common, **width, **options))


def evaluated(model, x):
    copy = nnx.clone(model)
    copy.eval()
    return np.asarray(copy(x))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("resnet8", "batch, height, width, 3", ""),
        ("mlp", "batch, 16, 16, 3", "height and width are fixed: "),
    ],
)
def test_extents_are_free_where_the_network_allows_it(name, text, said):
    prepared = prepare(model_of(name), normalized(pixels()))
    assert prepared.text == text
    assert prepared.fixed.startswith(said) and bool(prepared.fixed) == bool(said)
    static = prepare(model_of(name), normalized(pixels()), symbolic=False)
    assert static.text == "4, 16, 16, 3" and static.other_images() is None


def test_a_network_with_a_fixed_batch_says_so():
    class Fixed(nnx.Module):
        def __call__(self, x):
            return x.reshape(4, -1).sum(-1, keepdims=True) * jnp.ones((4, 7))

    prepared = prepare(Fixed(), normalized(pixels()))
    assert prepared.text == "4, 16, 16, 3"
    assert prepared.fixed.startswith("the batch is fixed: ")


@pytest.mark.parametrize("method", ["mimicnorm", "batchnorm"])
def test_stablehlo_is_the_network_at_every_size(method, tmp_path):
    model = model_of(method=method)
    file = tmp_path / "network.stablehlo"
    exported = export_stablehlo(model, normalized(pixels()), file=file, about=ABOUT)
    assert exported.input_shape == ("batch", "height", "width", 3)
    assert 0 < exported.difference < 1e-5
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    for x in (normalized(pixels(1)), normalized(pixels(3, 24))):
        expected = evaluated(model, x)
        np.testing.assert_allclose(program.call(x), expected, atol=1e-5 * np.abs(expected).max())
    said = json.loads((tmp_path / "network.stablehlo.json").read_text())
    assert said["classes"] == list("abcdefg") and said["temperature"] == 0.5
    assert said["input"]["mean"] == [0.4, 0.5, 0.6] and said["input"]["resize"] == 20
    assert said["versions"]["jax"] == jax.__version__
    assert {path.name for path in tmp_path.iterdir()} == {file.name, file.name + ".json"}


def test_pixels_are_normalized_inside(tmp_path):
    model, file = model_of(), tmp_path / "network.stablehlo"
    export_stablehlo(model, pixels(), file=file, about=ABOUT, normalize=True, symbolic=False)
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    assert program.in_avals[0].dtype == np.uint8 and program.in_avals[0].shape == (4, 16, 16, 3)
    expected = evaluated(model, normalized(pixels()))
    np.testing.assert_allclose(program.call(pixels()), expected, atol=2e-5 * np.abs(expected).max())


def test_stablehlo_needs_neither_flax_nor_this_package(tmp_path):
    model, file = model_of(), tmp_path / "network.stablehlo"
    export_stablehlo(model, normalized(pixels()), file=file)
    np.save(tmp_path / "images.npy", normalized(pixels(2)))
    code = (
        "import sys, jax, numpy as np\n"
        "sys.modules['flax'] = sys.modules['mimicnorm_jax'] = None\n"
        "program = jax.export.deserialize(bytearray(open('network.stablehlo', 'rb').read()))\n"
        "np.save('logits.npy', program.call(np.load('images.npy')))\n"
    )
    subprocess.run([sys.executable, "-c", "import jax.export\n" + code], cwd=tmp_path, check=True)
    expected = evaluated(model, normalized(pixels(2)))
    found = np.load(tmp_path / "logits.npy")
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("symbolic", [True, False])
def test_weights_beside_the_program(symbolic, tmp_path):
    model, file = model_of("vgg11", size=32), tmp_path / "network.stablehlo"
    x = normalized(pixels(2, 32))
    export_stablehlo(model, x, file=file, weights="beside", symbolic=symbolic)
    weights = load_file(tmp_path / "network.stablehlo.safetensors")
    assert file.stat().st_size < sum(array.nbytes for array in weights.values()) / 10
    assert json.loads((tmp_path / "network.stablehlo.json").read_text())["weights"] == "beside"
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    expected = evaluated(model, x)
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(program.call(weights, x), expected, atol=tolerance)
    halved = weights | {name: weights[name] / 2 for name in list(weights)[-2:]}
    assert np.abs(program.call(halved, x) - expected).max() > 1e3 * tolerance


def test_weights_beside_do_not_outlive_their_program(tmp_path):
    model, file = model_of("mlp"), tmp_path / "n.stablehlo"
    for weights in ("beside", "inside"):
        export_stablehlo(model, normalized(pixels()), file=file, weights=weights)
    assert {path.name for path in tmp_path.iterdir()} == {"n.stablehlo", "n.stablehlo.json"}
    beside = tmp_path / "n.stablehlo.safetensors"
    beside.write_text("of somebody else")
    export_stablehlo(model, normalized(pixels()), file=file)
    assert beside.read_text() == "of somebody else"


@pytest.mark.parametrize("platforms", ["cpu", (), ("cpu", "gpu")])
def test_platforms_are_known(platforms, tmp_path):
    with pytest.raises(UserError, match=r"platforms=.*allowed: some of cpu, cuda, tpu, rocm"):
        export_stablehlo(
            model_of("mlp"), normalized(pixels()), file=tmp_path / "n", platforms=platforms
        )


@pytest.mark.parametrize("kind", ["onnx", "stablehlo", "safetensors"])
def test_what_is_known_may_be_of_numpy(kind, tmp_path):
    about = About(
        classes=np.arange(7),
        mean=np.array([0.4, 0.5, 0.6], np.float32),
        std=jnp.array([0.2, 0.25, 0.3]),
        temperature=np.float32(1.5),
        run={"accuracy": np.float32(0.5), "steps": np.int64(3), "where": tmp_path},
    )
    assert about.classes == tuple("0123456") and about.temperature == 1.5
    assert about.run == {"accuracy": 0.5, "steps": 3, "where": str(tmp_path)}
    place = tmp_path / "out"
    named = {"folder": place} if kind == "safetensors" else {"file": place}
    write = getattr(mimicnorm_jax, f"export_{kind}")
    write(model_of("mlp"), normalized(pixels()), about=about, **named)


class Several(nnx.Module):
    """Outputs of which one has the classes, and one has no axes."""

    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(3, 7, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(x.mean((1, 2)))
        return {"features": x, "logits": self.dense(x), "mean": x.mean()}


def test_one_of_several_outputs_has_the_classes(tmp_path):
    model, x = Several(nnx.Rngs(0)), normalized(pixels())
    model.eval()
    options = {"file": tmp_path / "n.stablehlo", "symbolic": False}
    export_stablehlo(model, x, about=About(classes="abcdefg"), **options)
    with pytest.raises(UserError, match="5 classes were given, and there are 3 or 7 logits"):
        export_stablehlo(model, x, about=About(classes="abcde"), **options)


def test_keys_of_random_numbers_are_no_weights(tmp_path):
    model, x = Several(nnx.Rngs(0)), normalized(pixels())
    export_safetensors(model, x, folder=tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {
        *("dense.kernel", "dense.bias")
    }
    other = Several(nnx.Rngs(1))
    load_safetensors(other, tmp_path / "out")
    np.testing.assert_array_equal(other.dense.kernel[...], model.dense.kernel[...])


def test_an_export_is_replaced_from_inside_of_it_and_through_a_link(tmp_path, monkeypatch):
    model, x, out = model_of("mlp"), normalized(pixels()), tmp_path / "out"
    export_safetensors(model, x, folder=out)
    monkeypatch.chdir(out)
    export_safetensors(model, x, folder=".", about=ABOUT)
    assert "a, b, c" in (out / "README.md").read_text()
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "model.safetensors", "README.md")
    }
    (tmp_path / "link").symlink_to(out)
    export_safetensors(model, x, folder=tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and "a, b, c" not in (out / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "link"}


def test_weights_are_inside_or_beside(tmp_path):
    with pytest.raises(UserError, match=r"weights='near'; allowed: inside, beside"):
        export_stablehlo(
            model_of("mlp"), normalized(pixels()), file=tmp_path / "n.stablehlo", weights="near"
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_networks_leave_in_float32(dtype, tmp_path):
    class Narrow(nnx.Module):
        def __init__(self, rngs):
            options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
            self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, **options)
            self.norm = nnx.BatchNorm(4, **options)

        def __call__(self, x):
            return self.norm(self.conv(x)).mean((1, 2))

    prepared = prepare(perturbed(Narrow(nnx.Rngs(0))), normalized(pixels()))
    leaves = jax.tree.leaves(nnx.state(prepared.network))
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_images_of_other_floats_are_taken_as_float32(dtype):
    prepared = prepare(model_of("mlp"), normalized(pixels()).astype(dtype))
    assert prepared.images.dtype == prepared.spec.dtype == np.float32


@pytest.mark.parametrize("write", [export_stablehlo, export_safetensors])
def test_what_differs_is_not_kept(write, monkeypatch, tmp_path):
    before = (tmp_path / "kept").with_suffix(".stablehlo")
    before.write_text("before")
    kind = {"file": before} if write is export_stablehlo else {"folder": tmp_path / "folder"}
    module = sys.modules[write.__module__]
    runner = module._runner
    monkeypatch.setattr(
        module, "_runner", lambda *args: lambda x: [leaf + 0.01 for leaf in runner(*args)(x)]
    )
    with pytest.raises(UserError, match=r"differs from the network by 0\.0"):
        write(model_of(), normalized(pixels()), **kind)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.stablehlo"]
    assert before.read_text() == "before"


def test_a_difference_is_of_the_largest_output():
    large = [np.array([[100.0, 0.0]])]
    assert check_agreement([large[0] + 1e-3], large, "it") == pytest.approx(1e-5)
    with pytest.raises(UserError, match="it differs"):
        check_agreement([large[0] + 0.02], large, "it")
    with pytest.raises(UserError, match="it differs"):
        check_agreement([large[0] * np.nan], large, "it")
    with pytest.raises(UserError, match=r"\(1, 3\) where the network puts out \(1, 2\)"):
        check_agreement([np.zeros((1, 3))], large, "it")


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (pixels(), {}, "images of type uint8; allowed: normalized ones.* normalize=True"),
        (
            pixels(),
            {"normalize": True, "about": About(mean=(127.0,) * 3, std=(0.2,) * 3)},
            "not in units of 1",
        ),
        (
            normalized(pixels()),
            {"about": About(mean=(0.5,) * 3, std=(64.0,) * 3)},
            "not in units of 1",
        ),
        (normalized(pixels()), {"normalize": True}, "allowed: uint8"),
        (pixels(), {"normalize": True, "about": About()}, "needs mean and std"),
        (normalized(pixels()), {"about": About(classes=("a", "b"))}, "2 classes.* 7 logits"),
        (normalized(pixels())[:0], {}, "have no image to compare on"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, options, message, tmp_path):
    options = {"about": ABOUT} | options
    with pytest.raises(UserError, match=message):
        export_stablehlo(model_of(), images, file=tmp_path / "a.stablehlo", **options)
    assert not list(tmp_path.iterdir())


def test_where_it_cannot_be_written(tmp_path):
    model, x = model_of("mlp"), normalized(pixels())
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for folder, said in (
        ("others", "other files .thesis.txt"),
        ("file", "that is a file"),
        ("a/b", "a is not a folder"),
    ):
        with pytest.raises(UserError, match=said):
            export_safetensors(model, x, folder=tmp_path / folder)
    for file, said in (("others", "that is a folder"), ("a/b", "a is not a folder")):
        with pytest.raises(UserError, match=said):
            export_stablehlo(model, x, file=tmp_path / file)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "others", "thesis.txt"]


def test_weights_come_back_into_an_own_network(tmp_path):
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 5, (3, 3), use_bias=False, rngs=rngs)
            self.norm = nnx.BatchNorm(5, rngs=rngs)
            self.dense = nnx.Linear(5, 7, rngs=rngs)

        def __call__(self, x):
            return self.dense(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    model, x = perturbed(Network(nnx.Rngs(0))), normalized(pixels())
    exported = export_safetensors(model, x, folder=tmp_path / "out", about=ABOUT)
    assert str(exported).startswith(f"{tmp_path / 'out'}: images (batch, height, width, 3)")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {
        *("conv.kernel", "conv.bias", "dense.kernel", "dense.bias")
    }
    plain = mimicnorm_jax.fold(Network(nnx.Rngs(1)), x).network
    load_safetensors(plain, tmp_path / "out")
    np.testing.assert_allclose(plain(x), evaluated(model, x), atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'load_safetensors(plain, "out")' in card and "a, b, c" in card
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"]["6"] == "g"
    with pytest.raises(UserError, match="a network of your own"):
        mimicnorm_jax.load(tmp_path / "out")
    save_file({"conv.kernel": np.zeros((3, 3, 3, 6))}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: conv.bias, .*\(3, 3, 3, 6\)"):
        load_safetensors(plain, tmp_path / "out")
    export_safetensors(model, x, folder=tmp_path / "out")  # an earlier export is replaced
    assert "a, b, c" not in (tmp_path / "out" / "README.md").read_text()


def test_weights_whose_names_all_begin_alike_come_back(tmp_path):
    class Wrapped(nnx.Module):
        def __init__(self, rngs):
            self.module = nnx.Linear(3, 7, rngs=rngs)  # files of PyTorch's wrappers begin so

        def __call__(self, x):
            return self.module(x.mean((1, 2)))

    model, x = Wrapped(nnx.Rngs(0)), normalized(pixels())
    export_safetensors(model, x, folder=tmp_path / "out")
    other = Wrapped(nnx.Rngs(1))
    load_safetensors(other, tmp_path / "out")
    np.testing.assert_allclose(other(x), model(x), atol=1e-6)


def test_linen_networks_leave_too(tmp_path):
    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(4, (3, 3))(x)
            x = linen.BatchNorm(use_running_average=True)(x)
            return linen.Dense(7)(x.mean((1, 2)))

    x = jnp.asarray(normalized(pixels()))
    variables = Network().init(jax.random.key(0), x)
    file = tmp_path / "linen.stablehlo"
    export_stablehlo(Network(), variables, x, file=file)
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    np.testing.assert_allclose(program.call(x), Network().apply(variables, x), atol=1e-5)


def test_importing_the_package_imports_no_library_of_exports():
    libraries = "{'onnx', 'onnxruntime', 'safetensors'}"
    code = f"import mimicnorm_jax, sys; print({libraries} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert pathlib.Path(mimicnorm_jax.__file__).exists()
