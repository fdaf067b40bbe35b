"""Fixtures for tests on real ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from . import ranks


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], ranks.RankPool]]:
    """``rank_pool(world_size)``: the session's pool of that many Gloo ranks; all end with the session."""
    yield ranks.pool
    ranks.close_pools()
