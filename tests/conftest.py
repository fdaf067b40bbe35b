"""What all tests share."""

from __future__ import annotations

import pytest

from tests import GROUP_BYTES


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """In a fresh clone Numba has to compile first: once here, not in eight ranks, and on no test's time limit."""
    if session.config.option.collectonly or session.testsfailed:
        return
    import distsign.kernels.cpu  # noqa: F401 - compiles, once a machine


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the steps of small models have several exchange groups; doctests see what users do."""
    from distsign import plan

    monkeypatch.setattr(plan, "COALESCE_BYTES", GROUP_BYTES)


@pytest.fixture(params=["host", "device"])
def decided_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test twice: deciding on the host, and with CPU tensors the way a GPU is treated, by gates."""
    from distsign.optim.base import SignOptimizer

    if request.param == "device":
        monkeypatch.setattr(SignOptimizer, "_host_decides", staticmethod(lambda grads: False))
    return str(request.param)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let parameters of a few dozen elements be cut and put together as large ones are."""
    from distsign.optim import base

    monkeypatch.setattr(base, "tile_limit", lambda device: 16)
