"""The deliberate breakages themselves: that they can be read, and still fit the package."""

import pytest

from tests.breakages.__main__ import find_file, read_breakages

from .conftest import ROOT

BREAKAGES = read_breakages()


def test_there_are_many():
    assert len(BREAKAGES) >= 80


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_breakage_has_its_place_and_its_tests(name):
    breakage = BREAKAGES[name]
    assert not isinstance(place := find_file(ROOT, breakage.old), str), place
    assert breakage.old != breakage.new
    for test in breakage.tests:
        path, _, names = test.partition("::")
        text = (ROOT / path).read_text()
        for part in names.partition("[")[0].split("::"):
            assert f"def {part}(" in text or f"class {part}" in text, test
