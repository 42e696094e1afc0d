"""At initialization, theory knows every layer of every network, on photographs."""

import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.methods import METHODS, create_method
from mimicnorm_jax.models import NETWORKS
from mimicnorm_jax.theory import Probe

# Width and initializations: narrow networks are wider here, so that few initializations are
# enough to know the mean. The published widths, and large images, are in results/README.md.
KINDS = dict.fromkeys(NETWORKS, (1.0, 16)) | {
    "mlp": (1.0, 4),
    "vgg11": (0.5, 3),
    "resnet20": (2.0, 20),
    "resnet18": (1.0, 10),
    "squeezenet": (4.0, 12),
    "shufflenetv2_x0_5": (4.0, 16),
    "shufflenetv2_x1_0": (2.0, 8),
}

# The error of the correlation, of initializations of 16 channels too: their root mean square.
CORRELATION_KNOWN, CORRELATION_WITHIN = ("mimicnorm", "nonorm"), 0.2


@pytest.fixture(scope="module")
def photos():
    """A function that cuts four square crops of photographs, normalized."""
    from sklearn.datasets import load_sample_images

    def crops(size):
        step = 320 // size
        images = np.stack(
            [
                image[top : top + size * step : step, left : left + size * step : step]
                for image in load_sample_images().images
                for top, left in ((10, 20), (90, 280))
            ]
        )
        images = images / 255.0
        return jnp.asarray((images - images.mean((0, 1, 2))) / images.std((0, 1, 2)), jnp.float32)

    return crops


def ratios(network, method, images, *, draws, **options):
    """Predicted over measured second moment of every layer, means over initializations."""
    probe = Probe(
        network,
        method=create_method(method),
        num_classes=100,
        image_size=images.shape[1],
        precision="float32",
        **options,
    )
    measured, predicted, differences = [], [], []
    for seed in range(draws):
        probe.draw(seed)
        layers = probe.layers(images)
        measured.append([layer.measured.second_moment for layer in layers])
        predicted.append([layer.predicted_second_moment for layer in layers])
        correlations = [(la.predicted_correlation, la.measured.correlation) for la in layers]
        differences.append(np.subtract(*np.transpose(correlations)))
        for layer in layers:
            assert abs(layer.predicted_correlation) <= 1 + 1e-4, layer.name
    measured, predicted = np.mean(measured, axis=0), np.mean(predicted, axis=0)
    if method in CORRELATION_KNOWN:
        worst = np.where(measured > 0, np.sqrt(np.mean(np.square(differences), axis=0)), 0)
        assert worst.max() < CORRELATION_WITHIN, layers[int(worst.argmax())].name
    # the branches of Fixup and SkipInit end in 0
    np.testing.assert_array_equal(predicted == 0, measured == 0)
    return predicted[measured > 0] / measured[measured > 0], measured


@pytest.mark.parametrize(
    "network", [pytest.param(n, marks=() if n == "mlp" else pytest.mark.long) for n in KINDS]
)
def test_every_layer_is_predicted_within_25_percent(photos, network):
    width, draws = KINDS[network]
    ratio, measured = ratios(network, "mimicnorm", photos(32), width=width, draws=draws)
    np.testing.assert_allclose(ratio, 1.0, atol=0.25)
    assert measured.min() > 0.02  # nothing dies
    assert measured.max() < 50  # nothing explodes


def test_standardized_kernels_and_group_norms_are_predicted(photos):
    ratio, _ = ratios("mlp", "weightstandardization", photos(8), draws=4)
    np.testing.assert_allclose(ratio, 1.0, atol=0.25)


@pytest.mark.long
def test_large_images_are_predicted_too(photos):
    ratio, _ = ratios("resnet18", "mimicnorm", photos(96), draws=10)
    np.testing.assert_allclose(ratio, 1.0, atol=0.25)


# Most others leave something of this out; group norms are in test_signal.py.
QUICK = ("mimicnorm",)


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in QUICK else pytest.mark.long) for m in METHODS]
)
def test_every_method_is_predicted(photos, method):
    ratio, _ = ratios("resnet8", method, photos(16), draws=8)
    np.testing.assert_allclose(ratio, 1.0, atol=0.25)
