"""The lists of rules in C++, Triton, the reference and contract/rules.py are one, and what none of them has is refused."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests import devices
from tests.launching import launch as launch_pass
from zokern import backends
from zokern.backends import cpu, native  # cpu too: it asks the build when it is imported, and some tests take that away
from zokern.backends import triton as triton_backend
from zokern.contract import reference, reference_rules
from zokern.contract.rules import RULES, Rule
from zokern.directions import Direction
from zokern.passes import spec as scalars
from zokern.passes import table

NAMES = list(RULES)
try:  # not native.extension, which is none where the lists differ: that is a failure here
    BUILT: Any = importlib.import_module("zokern._C")
except ImportError:
    BUILT = None
SETS = BUILT.cpu_instruction_sets() if BUILT is not None else []
F32, F16, BF16 = 0, 1, 2
axpy = functools.partial(dataclasses.replace, scalars.AXPY)
CHUNKS = 9  # of which threads take four at once: a pass on several

needs_extension = pytest.mark.skipif(BUILT is None, reason="needs zokern._C")
needs_triton = pytest.mark.skipif(triton_backend.unavailable_reason() is not None, reason="needs Triton")


# ------------------------------------------------------------------------------------------------------------ the lists


def test_ids_are_places() -> None:
    assert [rule.id for rule in RULES.values()] == list(range(len(RULES)))
    assert [rule.name for rule in RULES.values()] == NAMES


@needs_extension
def test_cpp_has_the_same_rules() -> None:
    built = BUILT.rules()
    assert [rule["name"] for rule in built] == NAMES
    for its, rule in zip(built, RULES.values(), strict=True):
        assert its["direct"] == rule.direct
        assert (its["coefs"], its["scalars"], its["states"]) == (len(rule.coefs), len(rule.scalars), len(rule.states))
        assert its["written"] == rule.written
        assert its["squares"] == (rule.coefs.index("V") if "V" in rule.coefs else -1)
        assert its["perturbation"] == scalars.rule_of_probes(rule).name
    assert {rule["name"] for rule in built if rule["half_state"]} == {"scaled_axpy", "hizoo", "hizoo_restore"}


def test_the_reference_has_the_same_rules() -> None:
    assert list(reference_rules.FUNCTIONS) == NAMES


@needs_triton
@pytest.mark.parametrize("function", ["finish", "start_of_squares"])
def test_triton_has_the_same_rules(function: str) -> None:
    """SERVED is what launch.py compares, the names in the functions are what is compiled."""
    from zokern.backends.triton import rules

    assert list(rules.SERVED) == NAMES
    tree = ast.parse(Path(inspect.getsourcefile(rules) or "").read_text())
    body = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function)
    compared = {ast.unparse(node) for node in ast.walk(body) if isinstance(node, ast.Compare)}
    assert compared - {"w == 0.0", "g < 0.0", "g > 0.0"} == {f"RULE == '{name}'" for name in NAMES}


# ------------------------------------------------------------------------------------------- another list: no such backend


def changed(rule: str, **how: Any) -> Rule:
    return dataclasses.replace(RULES[rule], **how)


DOCTORED = {
    "scalars": (
        changed("adam", scalars=("decay",)),
        "rule 6 (adam) has scalars 6 in the build, 1 in zokern/contract/rules.py",
    ),
    "coefs": (changed("sign", coefs=("A",)), "rule 8 (sign) has coefs 2 in the build, 1 in zokern/contract/rules.py"),
    "squares": (changed("helene", coefs=("A", "V", "G")), "rule 4 (helene) has squares 2 in the build, 1 in"),
    "states": (changed("momentum", states=("m", "v")), "rule 5 (momentum) has states 1 in the build, 2 in"),
    "written": (changed("hizoo", written=0), "rule 2 (hizoo) has written 1 in the build, 0 in"),
    "direct": (changed("axpy", direct=False), "rule 0 (axpy) has direct True in the build, False in"),
    "perturbation": (
        changed("momentum", states=("h",)),
        "(momentum) has perturbation 'axpy' in the build, 'scaled_axpy'",
    ),
    "id": (changed("adam", id=8), "rule 6 (adam) is not in zokern/contract/rules.py"),
    "new": (changed("axpy", name="new", id=9), "rule 9 (new) is not in the build"),
}


@needs_extension
def test_the_extension_is_used() -> None:
    assert native.load() == (BUILT, None)
    assert cpu.AVAILABLE


@needs_extension
@pytest.mark.parametrize("what", DOCTORED)
def test_an_extension_of_other_rules_is_not_used(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, said = DOCTORED[what]
    monkeypatch.setitem(RULES, rule.name, rule)
    extension, reason = native.load()
    assert extension is None
    assert reason is not None
    assert said in reason
    assert "rebuild it: pip install --no-build-isolation -e ." in reason
    monkeypatch.setattr(native, "extension", extension)
    monkeypatch.setattr(native, "import_error", reason)
    assert backends.explain("cpu")["cpu"] == reason
    with pytest.raises(RuntimeError, match="of another version"):
        backends.choose("auto", torch.device("cpu"))


@needs_extension
def test_an_extension_without_a_list_or_with_more_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    built = BUILT.rules()
    for module, said in (
        (SimpleNamespace(), "it does not say which rules it has"),
        (SimpleNamespace(rules=lambda: built[:-1]), "rule 8 (sign) is not in the build"),
        (SimpleNamespace(rules=lambda: [*built, built[0]]), "rule 9 (axpy) is not in zokern/contract/rules.py"),
    ):
        monkeypatch.setitem(sys.modules, "zokern._C", module)
        extension, reason = native.load()
        assert extension is None
        assert said in str(reason)
        assert "rebuild it" in str(reason)


@needs_triton
def test_triton_with_other_rules_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from zokern.backends.triton import launch

    launch._check_rules()
    monkeypatch.setitem(RULES, "new", changed("axpy", name="new", id=9))
    monkeypatch.delitem(RULES, "sign")
    with pytest.raises(
        RuntimeError, match=r"new is missing in .*triton/rules.py; sign is missing in zokern/contract/rules.py"
    ):
        launch._check_rules()


# ---------------------------------------------------------------------------------------- what no list has, in a pass


class Case:
    """A pass of a rule, and a chain of two, on weights and states of ones that nothing may touch."""

    def __init__(self, name: str) -> None:
        rule = RULES[name]
        self.w = torch.ones(CHUNKS * table.CHUNK)
        self.states = [torch.ones_like(self.w) for _ in rule.states]
        self.rows = table.build([self.w], [self.w], [0], [0], [0], [[state] for state in self.states])
        numbers = self.numbers(rule)
        perturbs = scalars.rule_of_probes(rule)
        self.made = native.make_pass(self.rows, axpy(rule=rule), numbers)
        self.chain = scalars.Chain(
            [
                (axpy(rule=rule), numbers),
                (axpy(rule=perturbs), self.numbers(perturbs)),
            ],
            rule,
        )
        self.made_chain = native.make_chain(self.rows, self.chain)
        self.kept = numbers

    @staticmethod
    def numbers(rule: Rule) -> scalars.PassNumbers:
        coefs, shared = torch.full((1, len(rule.coefs), 1), 0.5), torch.full((1, len(rule.scalars)), 0.5)
        return scalars.PassNumbers(torch.tensor([3]), coefs, shared)

    def unchanged(self) -> bool:
        return all(bool((t == 1).all()) for t in (self.w, *self.states))


UNKNOWN = {
    "rule": (42, F32, F32, r"rule 42 is none of this build's \(axpy, scaled_axpy, .*sign\); rebuild zokern._C"),
    "one more": (len(RULES), F32, F32, "rule 9 is none"),
    "negative": (-1, F32, F32, "rule -1 is none"),
    "dtype": (0, 7, F32, "dtype 7 is none of this build's .*pass tensors"),
    "negative dtype": (5, -1, F32, "dtype -1 is none"),
    "state dtype": (0, F32, 3, "state dtype 3 is none of this build's"),
    "states of float16": (2, F32, F16, "hizoo has no states of float16; keep them in float32 or bfloat16"),
    "states of bfloat16": (5, F32, BF16, "momentum has no states of bfloat16; keep them in float32$"),
    "no states of bfloat16": (0, F32, BF16, "axpy has no states of bfloat16"),
}


@needs_extension
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("what", UNKNOWN)
def test_cpu_refuses_what_it_does_not_know(what: str, threads: int, instruction_set: str) -> None:
    number, dtype, state, said = UNKNOWN[what]
    case = Case(NAMES[number] if 0 <= number < len(RULES) else "axpy")
    how = {"dtype": dtype, "state_dtype": state, "threads": threads, "instruction_set": instruction_set}
    with pytest.raises(ValueError, match=f"^zokern: .*{said}"):
        BUILT.cpu_run(case.made, rule=number, **how)
    with pytest.raises(ValueError, match=f"^zokern: .*{said}"):
        BUILT.cpu_run_chain(case.made_chain, rule=number, **how)
    assert case.unchanged()


@needs_extension
@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("name", NAMES)
def test_cpu_has_every_rule_by_its_number(name: str, instruction_set: str) -> None:
    """That the refusals above are not for something else, and that chains perturb as told."""
    case, alone = Case(name), Case(name)
    how = {"dtype": F32, "state_dtype": F32, "threads": 2, "instruction_set": instruction_set}
    BUILT.cpu_run_chain(case.made_chain, rule=RULES[name].id, **how)
    for kind, numbers in alone.chain.stages:
        made = native.make_pass(alone.rows, kind, numbers)
        BUILT.cpu_run(made, rule=kind.rule.id, **how)
    assert not alone.unchanged()
    for ours, theirs in zip([case.w, *case.states], [alone.w, *alone.states], strict=True):
        assert torch.equal(ours, theirs)


@needs_extension
@pytest.mark.skipif(not hasattr(BUILT, "cuda_run"), reason="built without CUDA")
@pytest.mark.parametrize("what", UNKNOWN)
def test_cuda_refuses_what_it_does_not_know(what: str) -> None:
    """Before it looks for a GPU."""
    number, dtype, state, said = UNKNOWN[what]
    case = Case("axpy")
    for run, made in (
        (BUILT.cuda_run, case.made),
        (BUILT.cuda_run_chain, case.made_chain),
    ):
        with pytest.raises(RuntimeError, match=f"^zokern: .*{said}"):
            run(made, rule=number, dtype=dtype, state_dtype=state, device=0, stream=0)


@needs_extension
@pytest.mark.skipif(not hasattr(BUILT, "cuda_run"), reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available() or devices.EMULATED, reason="would launch passes over the host's memory")
def test_cuda_has_every_rule_by_its_number() -> None:
    """Without a GPU all that it knows ends at the device."""
    for rule, its in zip(RULES.values(), BUILT.rules(), strict=True):
        for state in (F32, BF16) if its["half_state"] else (F32,):
            case, how = Case(rule.name), {"rule": rule.id, "dtype": F16, "state_dtype": state, "device": 0, "stream": 0}
            with pytest.raises(RuntimeError, match="selecting the device"):
                BUILT.cuda_run(case.made, **how)
            said = "rule scaled_axpy has no chain" if rule.name == "scaled_axpy" else "selecting the device"
            with pytest.raises(RuntimeError, match=said):
                BUILT.cuda_run_chain(case.made_chain, **how)


@needs_extension
def test_ops_raise_for_states_that_the_compiled_rule_cannot_have() -> None:
    """And change nothing: it would read them as float32."""
    w, m = torch.ones(100), torch.ones(100, dtype=torch.bfloat16)
    rule = RULES["momentum"]
    numbers = Case.numbers(rule)
    with pytest.raises(ValueError, match=r"a pass of momentum has states of torch\.bfloat16; it keeps them in float32"):
        launch_pass(
            [w], None, states=[[m]], tensor_ids=[0], offsets=[0], groups=[0], seeds=numbers.seeds, coefs=numbers.coefs,
            shared=numbers.shared, rounding_seed=torch.tensor([1, 2]), rule="momentum", backend="cpu",
        )  # fmt: skip
    assert bool((torch.cat([w.float(), m.float()]) == 1).all())


class Uniform(Direction):
    """A direction that nobody knows."""

    name = "uniform"


def unrounded(spec: scalars.PassSpec) -> scalars.PassSpec:
    """A record that was not made by its class."""
    spec = dataclasses.replace(spec)
    object.__setattr__(spec, "rounding", "up")
    return spec


def test_a_record_refuses_a_rounding_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="rounding is 'up'; it must be one of 'nearest', 'stochastic'"):
        axpy(rounding="up")


@needs_triton
@pytest.mark.parametrize("what", ["rule", "chain", "distribution", "rounding"])
def test_triton_refuses_what_it_does_not_know(what: str) -> None:
    from zokern.backends.triton import launch

    if not launch.INTERPRETED:
        pytest.skip("on CPU tensors")
    rule = RULES["momentum"]
    unknown = changed("momentum", name="heavy_ball")
    kinds = {
        "rule": axpy(rule=unknown),
        "distribution": scalars.PassSpec(rule, Uniform()),
        "rounding": unrounded(axpy(rule=rule)),
    }
    w, m = torch.ones(100, dtype=torch.bfloat16), torch.ones(100)
    rows = table.build([w], [w], [0], [0], [0], [[m]])
    numbers = Case.numbers(rule)
    name = {"distribution": "uniform", "rounding": "up"}.get(what, "heavy_ball")

    def run() -> None:
        if what == "chain":
            launch.run_chain(rows, scalars.Chain([(kinds["rule"], numbers)], unknown))
        else:
            launch.run(rows, kinds[what], numbers)

    with pytest.raises(Exception, match=f"does not know the .*{name}"):  # the interpreter's own kind of error
        run()
    assert bool((torch.cat([w.float(), m.float()]) == 1).all())


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"rule": "heavy_ball"}, "rule is 'heavy_ball'; it must be one of 'axpy'"),
        ({"distribution": "uniform"}, "distribution is 'uniform'"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
    ],
)
@pytest.mark.parametrize("seeds", [[], [3]])
def test_the_reference_refuses_what_it_does_not_know(what: dict[str, str], said: str, seeds: list[int]) -> None:
    how: dict[str, Any] = {"rule": "axpy", "dtype": "float32"} | what
    with pytest.raises(ValueError, match=said):
        reference_rules.apply(
            src=np.ones(8, np.float32), states={}, tensor_id=0, seeds=seeds, coefs={"A": [0.5] * len(seeds)},
            scalars={"decay": 1.0}, **how,
        )  # fmt: skip


def test_the_references_functions_refuse_what_they_do_not_know() -> None:
    x = np.ones(8, np.float32)
    with pytest.raises(ValueError, match="distribution is 'uniform'"):
        reference.noise(8, 1, 0, distribution="uniform")
    for dtype in ("float32", "float16"):
        with pytest.raises(ValueError, match="rounding is 'up'"):
            reference.round_to(x, dtype, "up")
    with pytest.raises(ValueError, match="dtype is 'float64'"):
        reference.round_to(x, "float64")
    with pytest.raises(ValueError, match="dtype is 'float64'"):
        reference.widen(x, "float64")


def test_the_reference_backend_refuses_what_it_does_not_know() -> None:
    w = torch.ones(100)
    rows = table.build([w], [w], [0], [0], [0])
    for kind in (
        axpy(rule=changed("axpy", name="heavy_ball")),
        axpy(direction=Uniform()),
        unrounded(scalars.AXPY),
    ):
        with pytest.raises(ValueError, match="must be one of"):
            backends.module("reference").run(rows, kind, Case.numbers(RULES["axpy"]))
    assert bool((w == 1).all())
