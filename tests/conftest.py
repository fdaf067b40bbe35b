"""What all tests share."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """In a fresh clone Numba has to compile first: once here, not in eight ranks, and on no test's time limit."""
    if session.config.option.collectonly or session.testsfailed:
        return
    import distsign.kernels.cpu  # noqa: F401 - compiles, once a machine
