import json

import jax
import pytest
from flax import nnx

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.models import create_model
from mimicnorm_jax.tools.benchmark import torch_networks, torch_step

torch = pytest.importorskip("torch")

TINY = {"num_classes": 10, "image_size": 32, "width": 0.125}


@pytest.mark.parametrize("method", torch_networks.METHODS)
@pytest.mark.parametrize(
    ("network", "image_size"),
    [("resnet18", 32), ("resnet50", 32), ("vgg16", 32), ("resnet50", 224)],
)
def test_the_parameters_are_as_many_as_ours(network, image_size, method):
    options = {"num_classes": 100, "image_size": image_size}
    ours = nnx.eval_shape(lambda: create_model(network, method=method, rngs=nnx.Rngs(0), **options))
    with torch.device("meta"):  # shapes only
        theirs = torch_networks.create_network(network, method, **options)
    shapes = [x.shape for x in jax.tree.leaves(nnx.state(ours, nnx.Param))]
    assert len(shapes) == len(list(theirs.parameters()))
    assert sum(p.numel() for p in theirs.parameters()) == sum(
        x.size for x in jax.tree.leaves(nnx.state(ours, nnx.Param))
    )


@pytest.mark.parametrize(
    ("network", "image_size"), [("resnet18", 32), ("resnet50", 96), ("vgg11", 64)]
)
def test_a_narrow_network_maps_images_to_logits(network, image_size):
    model = torch_networks.create_network(
        network, "nonorm", num_classes=7, image_size=image_size, channels=1, width=0.125
    )
    assert model(torch.zeros(2, 1, image_size, image_size)).shape == (2, 7)


@pytest.mark.parametrize("precision", torch_step.PRECISIONS)
def test_training_lowers_the_loss(precision):
    torch.manual_seed(0)
    model = torch_networks.create_network("resnet18", "batchnorm", **TINY)
    step = torch_step.make_step(
        model.to(memory_format=torch.channels_last),
        torch_step.make_loss(model, "cpu", precision),
        torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8),
        torch.randint(0, 10, (8,)),
        learning_rate=0.05,
        weight_decay=1e-4,
    )
    losses = [step().item() for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]


def test_a_step_is_timed():
    timed = torch_step.prepare(
        *("resnet18", "nonorm"),
        **TINY,
        channels=3,
        batch_size=4,
        precision="auto",
        learning_rate=1e-3,
        weight_decay=1e-4,
    )
    assert timed.seconds(2) > 0
    assert timed.flops == 0 and timed.compile_s == 0 and not timed.compiled
    assert timed.peak_bytes() is None


@pytest.mark.parametrize(
    ("network", "method", "message"),
    [
        ("squeezenet", "batchnorm", "unknown network for methods that begin with torch: 'squeez"),
        ("resnet20", "batchnorm", "unknown network"),
        ("resnet18", "mimicnorm", "unknown --methods 'torch:mimicnorm'"),
    ],
)
def test_what_is_not_offered_is_said(network, method, message):
    with pytest.raises(UserError, match=message):
        torch_networks.create_network(network, method, **TINY)


STEP = (
    *("step", "--config=configs/cifar100_resnet18.py", "--config.width=0.125", "--batch=4"),
    *("--seconds=0.01", "--rounds=1"),
)


def test_both_are_compared_in_the_order_that_was_asked_for(run_main, tmp_path):
    methods, path = ["torch:nonorm", "nonorm", "torch:batchnorm"], tmp_path / "step.json"
    done = run_main(
        *(*STEP, f"--methods={','.join(methods)}", f"--json={path}"),
        module="mimicnorm_jax.tools.benchmark",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["methods"]
    assert [row["method"] for row in rows] == methods
    assert rows[0]["ratio"] == 1 and all(row["images_per_second"] > 0 for row in rows)
    assert [row.get("compiled") for row in rows] == [False, None, False]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("batchnorm,torch:plain", "unknown --methods 'torch:plain'"),
        ("torch:nonorm:activation_storage=int8", "config.activation_storage = 'int8' is not"),
        ("torch:nonorm:precision=float64", "unknown precision for methods that begin with torch:"),
    ],
)
def test_a_wrong_label_is_one_line(run_main, methods, message):
    done = run_main(*STEP, f"--methods={methods}", module="mimicnorm_jax.tools.benchmark")
    assert done.returncode == 2, done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert message in line
