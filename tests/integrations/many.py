"""Functions run by several processes at once that have the frameworks imported already, which takes seconds: they come from
a server of their own, so that other tests' processes stay small."""

from __future__ import annotations

import multiprocessing.forkserver
from collections.abc import Callable
from typing import Any
from unittest import mock

from tests.distributed import ranks

FRAMEWORKS = (
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "zokern.integrations.transformers",
    "lightning",
    "zokern.integrations.lightning",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "sentence_transformers",
)
_servers: dict[tuple[str, ...], Any] = {}


def run(world: int, function: Callable[..., Any], *args: Any, frameworks: tuple[str, ...] = FRAMEWORKS) -> list[Any]:
    """As ranks.run."""
    server = _servers.setdefault(frameworks, multiprocessing.forkserver.ForkServer())
    server.set_forkserver_preload([*frameworks, *ranks.BESIDES])
    with mock.patch.object(multiprocessing.forkserver, "connect_to_new_process", server.connect_to_new_process):
        return ranks.run(world, function, *args)
