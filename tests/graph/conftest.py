"""One host and transcoder for all tests of graphs."""

from __future__ import annotations

import pytest

from pairs import Pair, make_pair


@pytest.fixture(scope="session")
def pair() -> Pair:
    return make_pair()
