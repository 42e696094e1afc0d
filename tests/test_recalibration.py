"""Statistics of all the data, for the norms of any network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimicnorm_jax import LastBN, UserError, convert, create_model, recalibrate
from mimicnorm_jax.layers.batch_norm import ShiftedBatchNorm

IMAGES = np.random.default_rng(0).normal(2.0, 3.0, (50, 6, 6, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def _rank_promotion_as_flax_needs_it():
    with jax.numpy_rank_promotion("allow"):
        yield


def parts(*sizes):
    ends = np.cumsum(sizes)
    assert ends[-1] == len(IMAGES)
    return [IMAGES[end - size : end] for size, end in zip(sizes, ends, strict=True)]


class Body(nnx.Module):
    def __init__(self, *norms, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norms = nnx.List(norms)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)
        self.last = LastBN(5)

    def before(self, x):
        x = self.conv(x)
        for norm in self.norms:
            x = norm(x)
        return self.head(self.dropout(nnx.relu(x).mean((1, 2))))

    def __call__(self, x):
        return self.last(self.before(x))


@pytest.mark.parametrize("sizes", [(50,), (20, 30), (16, 16, 16, 2), (49, 1)])
def test_the_last_bns_statistics_are_those_of_all_examples(sizes):
    model = Body(rngs=nnx.Rngs(0))
    kernel = model.head.kernel[...]
    recalibrate(model, parts(*sizes))
    assert not model.last.use_running_average and not model.dropout.deterministic
    np.testing.assert_array_equal(model.head.kernel[...], kernel)
    model.eval()
    logits = np.asarray(model.before(IMAGES), np.float64)
    np.testing.assert_allclose(model.last.mean[...], logits.mean(0), rtol=1e-4)
    np.testing.assert_allclose(model.last.var[...], logits.var(0, ddof=1), rtol=1e-4)
    assert abs(float(model(IMAGES).mean())) < 1e-4


class OwnBatchNorm(nnx.BatchNorm):
    def __call__(self, x, *args, **kwargs):
        return super().__call__(2.0 * x, *args, **kwargs)


@pytest.mark.parametrize("kind", [nnx.BatchNorm, OwnBatchNorm, ShiftedBatchNorm])
def test_batch_norms_come_before_the_last_bn(kind):
    """Each batch normalized by its own; then the logits in evaluation mode."""
    model = Body(kind(4, rngs=nnx.Rngs(1)), rngs=nnx.Rngs(0))
    recalibrate(model, parts(20, 30))
    (norm,) = model.norms
    given = np.asarray(model.conv(IMAGES), np.float64) * (2 if kind is OwnBatchNorm else 1)
    biased = 1 if kind is ShiftedBatchNorm else 0
    np.testing.assert_allclose(norm.mean[...], given.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(norm.var[...], given.var((0, 1, 2), ddof=biased), rtol=1e-4)
    model.eval()
    np.testing.assert_allclose(model.last.mean[...], model.before(IMAGES).mean(0), rtol=1e-3)


def test_of_two_batch_norms_the_second_sees_what_it_sees_in_training():
    model = Body(nnx.BatchNorm(4, rngs=nnx.Rngs(1)), nnx.BatchNorm(4, rngs=nnx.Rngs(1)),
                 rngs=nnx.Rngs(0))  # fmt: skip
    recalibrate(model, parts(20, 30))
    np.testing.assert_allclose(model.norms[1].mean[...], 0.0, atol=1e-5)
    np.testing.assert_allclose(model.norms[1].var[...], 1.0, rtol=1e-4)


class Told(nnx.Module):
    """It says at the call whether its norms evaluate, as is usual in Flax."""

    def __init__(self, rngs):
        self.first, self.second = (nnx.BatchNorm(3, rngs=rngs) for _ in range(2))
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.last = LastBN(3)

    def __call__(self, x, train):
        x = self.linear(self.first(x, use_running_average=not train))
        x = self.second(x, not train)
        return self.last(x, not train)


@pytest.mark.parametrize("train", [True, False])
def test_what_the_network_says_at_the_call_does_not_matter(train):
    x = IMAGES[:, 0, 0]
    model = Told(nnx.Rngs(0))
    recalibrate(model, [[x, train]])
    first = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    given = np.asarray(model.linear(first), np.float64)
    np.testing.assert_allclose(model.second.var[...], given.var(0), rtol=1e-3)
    y = model(x, False)
    np.testing.assert_allclose(y.mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(y.var(0, ddof=1), 1.0, rtol=1e-2)


class Masked(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.last = LastBN(3)

    def __call__(self, x, mask, names=None, *, doubled=False):
        assert names in (None, "a name") and doubled is False
        x = self.norm(self.norm(x, mask=mask[:, None]), mask=mask[:, None])  # called twice
        return self.last(x, mask=mask)


def test_masks_other_arguments_and_norms_that_are_called_twice_are_heeded():
    x, mask = IMAGES[:10, 0, 0], np.arange(10) < 6
    model = Masked()
    recalibrate(model, [(x[:5], mask[:5], "a name"), (x[5:], mask[5:], "a name")])
    kept = x[:6].astype(np.float64)
    # half of what it was given are these, half is normalized: of mean 0 and, by batches, 1 or 0
    np.testing.assert_allclose(model.norm.mean[...], kept.mean(0) / 2, rtol=1e-4)
    model.eval()
    assert np.isfinite(model(x, mask)).all()


def test_a_converted_network_and_an_own_way_to_call_it():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.head = nnx.Conv(8, 5, (1, 1), rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.conv(x)))).mean((1, 2))

    model, _ = convert(Network(nnx.Rngs(0)), IMAGES)
    batches = [{"image": part} for part in parts(20, 30)]
    recalibrate(model, batches, call=lambda model, batch: model(batch["image"]))
    model.eval()
    y = np.asarray(model(IMAGES), np.float64)
    np.testing.assert_allclose(y.mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(y.var(0, ddof=1), 1.0, rtol=1e-2)


def test_a_built_in_network_is_better_after_it_than_after_its_first_step():
    model = create_model("mlp", method="mimicnorm", num_classes=4, image_size=6, rngs=nnx.Rngs(0))
    recalibrate(model, (part for part in parts(25, 25)))  # one pass: a generator does
    model.eval()
    np.testing.assert_allclose(model(IMAGES).mean(0), 0.0, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0)), [IMAGES], "no LastBN and no BatchNorm"),
        (lambda: LastBN(3), [], "was given no batches"),
        (lambda: LastBN(3), [IMAGES[:1, 0, 0]], "the norm: statistics need at least 2 values"),
        (lambda: LastBN(3), [IMAGES[:4, 0, 0] * np.inf], "not all of what reaches it is finite"),
        (lambda: LastBN(3), [{"image": IMAGES}], r"a batch with names \(image\) needs call="),
        (lambda: Unused(), [IMAGES[:, 0, 0]], "last: the network did not call it"),
        (lambda: Body(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)), iter([IMAGES]),
         "needs two passes.*a list"),
        (lambda: jnp.sum, [IMAGES], "takes an nnx.Module"),
        (lambda: Unused(), [(IMAGES, IMAGES)], r"2 parts does not fit.*call=lambda"),
        (lambda: LastBN(3), IMAGES, r"a list of batches: give \[images\]"),
        (lambda: nnx.vmap(lambda _: LastBN(3), in_axes=0)(jnp.arange(2)), [IMAGES],
         "the norm is a stack of norms"),
    ],
)  # fmt: skip
def test_what_is_refused_is_said(model, batches, message):
    with pytest.raises(UserError, match=message):
        recalibrate(model(), batches)


class Unused(nnx.Module):
    def __init__(self):
        self.last = LastBN(3)

    def __call__(self, x):
        return x
