"""What docs/faq.md says of zokern: messages, commands, defaults and links. Its Python runs in test_repository.py."""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import zokern
from tests.command_lines import parse
from tests.models import linear, toy
from zokern import backends, placement
from zokern.backends import cuda, native
from zokern.finetune.options import Options
from zokern.optim import ENTRIES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "faq.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
COMMANDS = [line for language, text in FENCE.findall(PAGE) if not language for line in text.splitlines()]
INLINE = re.findall(r"`([^`\n]+)`", FENCE.sub("", PAGE))
WORDS = re.sub(r"`[^`\n]+`", "", FENCE.sub("", PAGE))


def told(
    steps: int, closure: Callable[[nn.Module], object], dtype: torch.dtype = torch.float32, lr: float = 0.0
) -> str:
    """The warnings of some steps."""
    model = linear(8, 4).to(dtype)
    opt = zokern.MeZO(model, lr)
    with warnings.catch_warnings(record=True) as every:
        warnings.simplefilter("always")
        for _ in range(steps):
            opt.step(lambda: closure(model))
    return " ".join(str(one.message) for one in every)


def on_gpu(monkeypatch: pytest.MonkeyPatch, seen: bool, capability: tuple[int, int], **build: object) -> str:
    """Why the kernels of a build do not run."""
    monkeypatch.setattr(native, "import_error", None)
    monkeypatch.setattr(native, "extension", SimpleNamespace(**build))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return str(cuda.unavailable_reason(torch.device("cuda")))


def refused_device(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    with pytest.raises(RuntimeError) as refused:
        backends.choose("auto", torch.device("mps"))
    return str(refused.value)


BUILD = {"cuda_run": None, "cuda_architectures": "80-real"}
X = torch.ones(2, 8)
SAID: dict[str, Callable[[pytest.MonkeyPatch], str]] = {
    "a loss was not finite": lambda _: told(1, lambda model: float("nan")),
    "equal to the last bit": lambda _: told(5, lambda model: 1.0),
    "most differences between two probes are rounded away": lambda _: told(
        1, lambda model: model(X.bfloat16()).mean(), torch.bfloat16
    ),
    "eps z changes": lambda _: str(
        zokern.check(model := linear(8, 4).bfloat16(), lambda: model(X.bfloat16()).float().mean(), eps=1e-7)
    ),
    "a step moves the trained weights by ... times their rms": lambda _: told(
        1, lambda model: model(X).square().sum(), lr=1.0
    ),
    "zokern._C was built without CUDA kernels": lambda patch: on_gpu(patch, True, (8, 0)),
    "PyTorch sees no CUDA device": lambda patch: on_gpu(patch, False, (8, 0), **BUILD),
    "it needs compute capability 8.0": lambda patch: on_gpu(patch, True, (7, 5), **BUILD),
    "rebuild with TORCH_CUDA_ARCH_LIST": lambda patch: on_gpu(patch, True, (9, 0), **BUILD),
    "zokern has no kernels for device mps": refused_device,
}


def test_no_message_is_quoted_that_is_not_tested() -> None:
    assert set(re.findall(r'"([^"\n]+)"', WORDS)) == set(SAID)


@pytest.mark.parametrize("message", SAID)
def test_messages_are_zokern_s(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = re.escape(message).replace(re.escape("..."), r"[\d.e+]+")
    assert re.search(pattern, re.sub(r"\s+", " ", SAID[message](monkeypatch)))


def test_commands_and_options_are_there() -> None:
    commands = [shlex.split(line)[1:] for line in COMMANDS + INLINE if line.startswith("zokern ")]
    options = [["finetune", *shlex.split(code)] for code in INLINE if code.startswith("--")]
    assert len(commands) == 4
    assert len(options) == 3
    for arguments in commands + options:
        assert parse(arguments)[0] == arguments[-1 if arguments == ["bench", "step"] else 0]


def test_defaults() -> None:
    assert Options().lr_schedule == "linear"
    assert Options().journal
    takers = {entry.cls.__name__ for entry in ENTRIES.values() if "scale" in entry.cls.settings}
    assert takers == {"MeZO", "LeZO", "FZOO", "ES"}  # of the first two, AdaMeZO's update
    assert zokern.MeZO.settings["scale"].help.startswith("Of adamezo's steps.")


def test_a_compiled_model_of_16_bits_has_a_whole_copy() -> None:
    assert placement.choose(toy(), True)[0] == "stream"
    assert placement.choose(torch.compile(toy(), backend="eager"), True)[0] == "shadow"


def test_a_backend_that_is_insisted_on_raises_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run on cpu: it works on CUDA tensors only"):
        zokern.MeZO(linear(8, 4), 1e-3, backend="cuda").step(lambda: 1.0)


def test_fsdp1_is_refused_by_name() -> None:
    wrapper = type("FullyShardedDataParallel", (nn.Sequential,), {})(nn.Linear(4, 2))
    with pytest.raises(TypeError, match=r"\(FSDP1\).*fully_shard \(FSDP2\)"):
        zokern.MeZO(wrapper, 1e-3)


def test_made_for_linux_and_no_other() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert re.findall('Operating System :: (.*)"', project) == ["POSIX :: Linux"]


def test_every_method_s_page_names_its_paper_on_top() -> None:
    for path in (ROOT / "docs" / "methods").glob("*.md"):
        assert "https://arxiv.org/abs/" in path.read_text().split("\n## ")[0][:400], path.name


@pytest.mark.parametrize("page", ["faq", "findings"])
def test_links_lead_to_headings(page: str) -> None:
    """That the files are there is tested in test_repository.py."""
    here = ROOT / "docs" / f"{page}.md"
    links = re.findall(r"\]\(([\w/.-]*)#([\w-]+)\)", here.read_text())
    assert links
    for target, anchor in links:
        text = (here.parent / target if target else here).read_text()
        headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", one).lower().replace(" ", "-") for one in headings}, (target, anchor)
