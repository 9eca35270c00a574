"""Fixtures of the tests on the stand-in CUDA library; without it every test here skips."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cuda_host.stand_in import FOLDER, StandIn, active

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if active() is not None:
        return
    # A run that asked for the library must not pass by skipping.
    if FOLDER in os.environ:
        raise pytest.UsageError("the stand-in CUDA library was not preloaded")
    skip = pytest.mark.skip(reason="no stand-in CUDA library: make cuda-host runs these tests on one")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    """The library; a test that uses it fails when a rule was broken meanwhile."""
    library = active()
    assert library is not None
    before = library.violations
    yield library
    assert library.violations == before, library.last_violation
