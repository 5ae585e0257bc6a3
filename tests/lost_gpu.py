"""Ends a test process whose GPU is lost. conftest.py has the hook.

An error in a kernel (an illegal address, a trap) stays: every later call of the process fails, and hundreds of tests that
are sound would be red. So the GPU is waited for after each test, and the first error ends the process with the name of the
test. Of pytest-xdist's workers that is one: its tests go on in a new one.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch

EXIT_CODE = 3


def error() -> str | None:
    """What CUDA says, its first line; None where all is well, or where this process has not used a GPU."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    done = yield
    if (said := error()) is None:
        return done
    message = f"CUDA is lost after {item.nodeid}: {said}"
    lost = pytest.TestReport(item.nodeid, item.location, {}, "failed", message, "teardown")
    item.ihook.pytest_runtest_logreport(report=lost)  # for the summary and the XML
    if hasattr(item.config, "workerinput"):
        os._exit(EXIT_CODE)  # pytest.exit would end the other workers too
    pytest.exit(message, returncode=EXIT_CODE)
