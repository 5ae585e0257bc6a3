"""The recipes of CONTRIBUTING.md, followed to the letter on a copy of the tree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EDIT = re.compile(
    r"^`(?P<path>[^`]+)`, (?P<how>new|after|in place of)(?: `(?P<line>[^\n]+)`)?:\n\n```(?:\w+)\n(?P<text>.*?)^```$",
    flags=re.DOTALL | re.MULTILINE,
)
COMMANDS = re.compile(r"^```sh\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def recipes() -> dict[str, str]:
    """The parts of "Adding", by their headings."""
    adding = re.search(r"\n## Adding\n(.*?)\n## ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    assert adding is not None
    parts = re.split(r"^### A (\w+)$", adding[1], flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def copied(to: Path) -> Path:
    """What git has of the tree, as it is now, with the built extension."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    built = [str(path.relative_to(ROOT)) for path in (ROOT / "zokern").glob("*.so")]
    for name in [*listed.split("\0"), *built]:
        if name and (ROOT / name).is_file() and not name.startswith(("benchmarks/results/", "docs/images/")):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def apply(tree: Path, recipe: str) -> list[str]:
    """Makes the changes of a recipe; the files that it names."""
    edits = list(EDIT.finditer(recipe))
    assert len(edits) == len(re.findall(r"^```(?!sh)\w+$", recipe, flags=re.MULTILINE)), "a block is not an edit"
    for edit in edits:
        path, text = tree / edit["path"], edit["text"]
        if edit["how"] == "new":
            assert not path.exists()
            path.write_text(text)
            continue
        old, line = path.read_text(), edit["line"]
        assert old.count(f"{line}\n") == 1, f"{edit['path']} has not exactly one line {line!r}"
        path.write_text(old.replace(f"{line}\n", (f"{line}\n" if edit["how"] == "after" else "") + text))
    return list(dict.fromkeys(edit["path"] for edit in edits))


def commands(recipe: str) -> list[str]:
    return [line for block in COMMANDS.findall(recipe) for line in block.splitlines()]


def run(tree: Path, command: str) -> str:
    command = re.sub(r"^python ", f"{sys.executable} ", command)
    done = subprocess.run(command, shell=True, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
    return done.stdout


CHECK = """
import torch, zokern
from torch import nn
from zokern.finetune import Options, methods

def weights(cls, steps=3, state=None, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = nn.Linear(4, 2).to(dtype)
    opt = cls(model, lr=1e-2, seed=3, **settings)
    for step in range(steps):
        opt.step(lambda: model(torch.ones(3, 4, dtype=dtype) * (step + 1)).float().square().mean())
    return model.weight, opt

mine, mezo = weights(zokern.Cautious, share=1.0)[0], weights(zokern.MeZO)[0]
assert torch.equal(mine, mezo)
assert not torch.equal(weights(zokern.Cautious)[0], mezo)
assert methods.settings(Options(method="cautious", share=0.25))["share"] == 0.25
assert methods.settings(Options(method="es", tempered=0.5))["tempered"] == 0.5

opt = weights(zokern.ES, num_directions=2)[1]
saved = opt.state_dict()
del saved["zokern"]["options"]["tempered"]                  # as a version without it saved it
zokern.ES(nn.Linear(4, 2), 1e-2, num_directions=2, maximize=True).load_state_dict(saved)
try:
    zokern.ES(nn.Linear(4, 2), 1e-2, num_directions=2, maximize=True, tempered=0.5).load_state_dict(saved)
except ValueError as error:
    assert "tempered is 1.0 in state_dict and 0.5 here" in str(error), error
else:
    raise AssertionError("another setting was taken")

for dtype in (torch.float32, torch.bfloat16):
    for cls in (zokern.MeZO, zokern.HiZOO):
        kept, shadow = (weights(cls, dtype=dtype, placement=name)[0] for name in ("kept", "shadow"))
        assert torch.equal(kept, shadow)
"""


@pytest.mark.slow
def test_a_method_a_setting_and_a_placement(tmp_path: Path) -> None:
    """All three in one tree; each command once, and none that does a part of what another one does."""
    tree, found = copied(tmp_path), recipes()
    named = {name: apply(tree, found[name]) for name in ("method", "setting", "placement")}
    page = "docs/methods/cautious.md"
    assert named["method"] == ["zokern/optim/cautious.py", "zokern/optim/registry.py", page, "mkdocs.yml"]
    assert named["setting"] == ["zokern/optim/es.py"]
    assert named["placement"] == ["zokern/placement/kept.py", "zokern/placement/__init__.py"]
    said = {command: set(command.split()) for name in named for command in commands(found[name])}
    assert len(said) == 3
    for command, words in said.items():
        if not any(words < more for more in said.values()):
            run(tree, command)
    run(tree, f"{sys.executable} - <<'END'\n{CHECK}END")
    methods, page = ((tree / name).read_text() for name in ("docs/methods.md", "docs/methods/cautious.md"))
    assert "[Cautious](methods/cautious.md)" in methods
    assert "| `share` | `0.5` | at least 0, at most 1 |" in page
    assert "`tempered`" in (tree / "docs" / "methods" / "es.md").read_text()
    assert "kept" in methods


@pytest.mark.slow_machine_code
def test_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles the CPU's passes anew."""
    monkeypatch.setenv("ZOKERN_CUDA", "off")
    tree, recipe = copied(tmp_path), recipes()["rule"]
    assert len(apply(tree, recipe)) == 5
    build, *tests = commands(recipe)
    run(tree, build)
    for test in tests:
        assert " passed" in run(tree, test)


def test_a_rule_without_its_places_is_refused(tmp_path: Path) -> None:
    """What a contributor sees who has forgotten the compiled list."""
    tree, recipe = copied(tmp_path), recipes()["rule"]
    apply(tree, recipe)
    done = subprocess.run(
        [sys.executable, "-c", "import zokern; zokern.noise(4, seed=1, backend='cpu')"],
        cwd=tree, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "bounded" in done.stderr
