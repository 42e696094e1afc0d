import pytest

from mimicnorm_jax.tools.networks import TITLES, measure, table_line
from tests.conftest import ROOT


@pytest.mark.parametrize(
    "network",
    ["resnet18", "squeezenet", pytest.param("shufflenetv2_x0_5", marks=pytest.mark.long)],
)
def test_the_table_of_the_page_is_what_the_tool_prints(network):
    page = (ROOT / "docs" / "networks.md").read_text()
    assert "| " + " | ".join(TITLES) + " |" in page
    assert table_line(network, image_size=224, num_classes=1000) in page


def test_a_row_counts_parameters_flops_and_layers():
    row = measure("mlp", "mimicnorm", image_size=4, num_classes=10)
    plain = measure("mlp", "nonorm", image_size=4, num_classes=10)
    products = 4 * 4 * 3 * 256 + 256 * 256 + 256 * 10
    assert row.parameters == products + 2 * 256  # no bias before the last BN
    assert plain.flops == pytest.approx(2 * products, rel=0.02)
    assert (row.centred, row.layers) == (1, 3)  # the first fan-in is 48
