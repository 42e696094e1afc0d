"""Files that come from elsewhere, damaged: TFDS builds, exports, what a run was started from."""

import collections
import json

import pytest

import mimicnorm_jax
from mimicnorm_jax.data.splits import open_splits
from mimicnorm_jax.tools.export import export_run
from mimicnorm_jax.train import loop
from mimicnorm_jax.train.pretrained import NAME, check_pretrained, remembered
from mimicnorm_jax.train.setup import set_up
from tests.archives import data_config
from tests.wrong_inputs.damage import BYTES, assert_well_answered, outcome, sample

SEED = 23
COUNTS = [10, pytest.param(300, marks=pytest.mark.long)]


def check_answers(path, count, reader, *, inside=None, around=lambda content: content):
    """Damages a file in ``count`` ways, or a part of it, and looks how a reader answers.

    ``inside``: the part, which ``around`` makes a whole file of again.
    """
    whole = path.read_bytes()
    found = collections.defaultdict(list)
    for damage in sample(inside or whole, count, SEED):
        path.write_bytes(around(damage.content))
        found[outcome(reader)].append(damage.name)
    path.write_bytes(whole)
    # of the changed values a part is in what the reader does not look at
    assert_well_answered(found, path.name, at_least=len(BYTES) + count // 10)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_descriptions_of_tfds_builds(name, count, build):
    root = build.parent.parent
    check_answers(build / name, count, lambda: open_splits(data_config(root, "cifar100")))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("other") / "run"
    loop.train(tiny_config(network="mlp", max_steps=1), folder)
    return folder


@pytest.mark.parametrize("count", COUNTS)
def test_weights_that_a_run_started_from(count, run, tmp_path, tiny_config):
    config = tiny_config(network="mlp", max_steps=1, init_from=str(run))
    folder = tmp_path / "run"
    loop.train(config, folder)
    pretrained = set_up(config).pretrained

    def reader():
        check_pretrained(folder, pretrained)
        remembered(folder)

    check_answers(folder / NAME, count, reader)


@pytest.mark.parametrize("count", COUNTS)
def test_an_exported_network(count, run, tmp_path):
    folder = tmp_path / "out"
    export_run(run, "safetensors", folder)

    def reader():
        mimicnorm_jax.load(folder)

    check_answers(folder / "config.json", count, reader)
    weights = (folder / "model.safetensors").read_bytes()
    size = 8 + int.from_bytes(weights[:8], "little")
    header, numbers = weights[8:size], weights[size:]
    json.loads(header)

    def around(content):
        return len(content).to_bytes(8, "little") + content + numbers

    check_answers(folder / "model.safetensors", count, reader, inside=header, around=around)
