"""What all Python tests share: data that is fresh each run, and can be repeated."""

from __future__ import annotations

import functools
import os
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import keyfold
import numpy as np
import pytest
from reference import make_inputs

SEED = int(os.environ.get("KEYFOLD_TEST_SEED") or random.SystemRandom().randrange(2**32))


def pytest_report_header() -> str:
    device = keyfold.devices()[0]
    return f"keyfold {keyfold.__version__}, {device.kernel}; KEYFOLD_TEST_SEED={SEED}"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers of this test's own, whichever tests run before it."""
    return np.random.default_rng([SEED, *request.node.nodeid.encode()])


@pytest.fixture
def seed(rng: np.random.Generator) -> int:
    """Seed of this test's own for another library."""
    return int(rng.integers(2**31))


@pytest.fixture
def inputs(rng: np.random.Generator) -> Callable[..., tuple[Any, Any, Any]]:
    """Make q, k and v of a shape: make_inputs() with this test's random numbers."""
    return functools.partial(make_inputs, rng)


@pytest.fixture
def heeds_sigint() -> Iterator[None]:
    """Python's own handler, which it does not install where its parent ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
