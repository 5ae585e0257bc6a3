"""What the suite would else do thousands of times for nothing, a seventh of its time. conftest.py has the hooks.

- Garbage is looked for among objects that are newer than the file's first test, than what was imported, and than the test
  before that had all looked through. The modules of the frameworks and the tests stay to the end, and a Trainer looks
  through all that there is at each train().
- The specification's normals depend on their arguments alone, and most of those that the suite asks for it had before.
- A server of ranks that have the frameworks imported (tests/integrations/many.py) is started by one process of the suite.
- torch.manual_seed keeps the seed for each kind of device that is not there, with the text of the whole stack.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch

from zokern.contract import reference

SHORT = 2048  # elements: of longer tensors nothing is kept
KEPT = 1 << 12  # tensors, of 32 MB at most
WITH_FRAMEWORKS = "tests/integrations/test_ranks_"

_then = (0, 0)  # _now() when garbage was last looked for among all objects


def avoid() -> None:
    """From the start of the suite on."""
    reference._normals = kept(reference._normals)
    no_seeds_of_what_is_not_there()


def no_seeds_of_what_is_not_there() -> None:
    for kind in (torch.cuda, torch.xpu, torch.mtia):
        if not kind.is_available():
            kind.manual_seed_all = lambda seed: None


def kept(normals: Callable[..., Any]) -> Callable[..., Any]:
    """Of a function of numbers, of which the first says how many there are: its arrays, made once."""
    known = functools.lru_cache(KEPT)(normals)

    @functools.wraps(normals)
    def again(*args: int) -> Any:
        return known(*args).copy() if args[0] <= SHORT else normals(*args)

    return again


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """--dist loadfile, with the files whose tests start such ranks as if they were one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return WITH_FRAMEWORKS if file.startswith(WITH_FRAMEWORKS) else file

    return Files(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules come, and nothing goes."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    _look_at_newer_only()


@pytest.hookimpl(trylast=True)  # the fixtures are gone
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if _now() != _then or nextitem is None or nextitem.path != item.path:
        _look_at_newer_only()


def _now() -> tuple[int, int]:
    """How many modules there are, and how often all objects were looked through."""
    return len(sys.modules), gc.get_stats()[2]["collections"]


def _look_at_newer_only() -> None:
    global _then
    gc.collect()
    gc.freeze()
    _then = _now()
