"""The architecture of design.md section 2, read from the source: floors, who may import what, file sizes, cycles."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The longest prefix of a module's name decides its floor.
FLOORS = {
    "popax": 0,
    "popax.types": 0,
    "popax.errors": 0,
    "popax.trees": 0,
    "popax.compat": 0,
    "popax.memo": 0,
    "popax.named": 0,
    "popax.atomic": 0,
    "popax.version": 0,
    "popax.sharding": 1,
    "popax.distributed": 1,
    "popax.kernels": 1,
    "popax.modeling": 2,
    "popax.adapters.base": 2,
    "popax.adapters": 3,
    "popax.population": 4,
    "popax.objectives": 4,
    "popax.data": 4,
    "popax.store": 5,
    "popax.residency": 6,
    "popax.training": 7,
    "popax.evaluation": 7,
    "popax.serving": 7,
    "popax.plan": 7,
    "popax.audit": 7,
    "popax.bench": 7,
    "popax.demo": 7,
    "popax.cli": 8,
    "popax.configs": 8,
}
# The design separates the packages of floors 1 and 2 by a bar: they do not know each other. Elsewhere siblings may use
# each other (population calls an objective), without a cycle.
CLOSED_FLOORS = {1, 2}
# The benchmark calls kernels because it measures them.
KERNEL_CALLERS = (
    "popax.kernels",
    "popax.adapters",
    "popax.modeling.attention",
    "popax.modeling.experts",
    "popax.modeling.expert_factors",
    "popax.modeling.grouped",
    "popax.modeling.loss",
    "popax.bench.kernels",
)
KERNEL_IMPORTS = {"jax", "numpy"}
MAX_LINES = {"popax": 300, "popax.kernels": 400}


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def unit(module: str) -> str | None:
    """The entry of FLOORS that a module belongs to; None where the table does not know it."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in FLOORS and (name != "popax" or module == "popax"):
            return name
    return None


def imports(module: str, source: str, known: set[str]) -> set[str]:
    """Every module that the source imports, wherever the statement stands; `from a import b` is a.b if that is one."""
    is_package = any(other.startswith(module + ".") for other in known)
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base]) if base else ".".join(parts)
            submodules = {f"{base}.{alias.name}" for alias in node.names} & known
            found.update(submodules)
            if len(submodules) < len(node.names):
                found.add(base)
    return found


def violations(sources: dict[str, str]) -> list[str]:
    """What breaks the rules, one line each. sources: module name -> text."""
    known = set(sources)
    graph = {module: imports(module, source, known) for module, source in sources.items()}
    found = []
    for module, targets in sorted(graph.items()):
        found += [problem for target in sorted(targets) if (problem := forbidden(module, target))]
        found += source_problems(module, sources[module])
    return found + cycles({module: targets & known for module, targets in graph.items()})


def forbidden(module: str, target: str) -> str | None:
    """Why this import may not be, or None."""
    here, there = unit(module), unit(target)
    if here is None:
        return f"{module} stands on no floor: add its package to FLOORS and to the design"
    if inside(target, "gin") and FLOORS[here] < 8:
        return f"{module} imports gin; only the doors on floor 8 do"
    top = target.split(".")[0]
    if here == "popax.kernels" and not inside(target, "popax"):
        allowed = top in KERNEL_IMPORTS or top in sys.stdlib_module_names
        return None if allowed else f"{module} imports {target}; kernels know jax, numpy and the standard library"
    if not inside(target, "popax"):
        return None
    if there is None:
        return f"{module} imports {target}, which stands on no floor"
    if inside(target, "popax.kernels") and not any(inside(module, caller) for caller in KERNEL_CALLERS):
        callers = "adapters, modeling's attention, experts and loss, and their benchmark"
        return f"{module} imports {target}; only {callers} call kernels"
    if here == there or there == "popax" or FLOORS[there] < FLOORS[here]:
        return None
    if FLOORS[there] == FLOORS[here] and FLOORS[here] not in CLOSED_FLOORS:
        return None
    return f"{module} (floor {FLOORS[here]}) imports {target} (floor {FLOORS[there]}): imports go down only"


def source_problems(module: str, source: str) -> list[str]:
    found = []
    limit = MAX_LINES["popax.kernels" if inside(module, "popax.kernels") else "popax"]
    lines = len(source.splitlines())
    if lines > limit:
        found.append(f"{module} has {lines} lines; the limit is {limit}: split it")
    if module.split(".")[-1] == "utils":
        found.append(f"{module}: a module is named after what it holds")
    for node in ast.walk(ast.parse(source)):
        attribute = isinstance(node, ast.Attribute) and node.attr == "local" and ast.unparse(node.value) == "threading"
        imported = (
            isinstance(node, ast.ImportFrom)
            and node.module == "threading"
            and any(alias.name == "local" for alias in node.names)
        )
        if attribute or imported:
            found.append(f"{module} uses threading.local: pass state as an argument")
    return found


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """One line for each module that closes a circle of imports."""
    found, done, path = [], set(), []

    def visit(module: str) -> None:
        if module in path:
            found.append("import cycle: " + " -> ".join([*path[path.index(module) :], module]))
            return
        if module in done:
            return
        path.append(module)
        for target in sorted(graph[module]):
            visit(target)
        path.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)
    return found


def popax_sources() -> dict[str, str]:
    """Every module of the package, with kernels and configs at their place in it."""
    sources = {}
    for folder, name in (
        (ROOT / "popax", "popax"),
        (ROOT / "kernels", "popax.kernels"),
        (ROOT / "configs", "popax.configs"),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
            sources[".".join(parts)] = path.read_text(encoding="utf-8")
    return sources


def test_the_package_keeps_the_architecture():
    sources = popax_sources()
    assert {"popax", "popax.types", "popax.adapters.base", "popax.cli.main"} <= set(sources)
    assert any(inside(module, "popax.kernels") for module in sources)
    assert violations(sources) == []


def test_kernels_has_no_init():
    """With one, a checkout's root on sys.path shadows the `kernels` package that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "configs" / "__init__.py").exists()
    assert (ROOT / "popax" / "kernels").resolve() == ROOT / "kernels"
    assert (ROOT / "popax" / "configs").resolve() == ROOT / "configs"


BASE = {"popax": "", "popax.types": "", "popax.errors": "", "popax.adapters.base": "", "popax.store": ""}


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("popax.modeling.transformer", "from popax.adapters import base", "imports go down only"),
        ("popax.modeling.transformer", "import popax.adapters.base", "imports go down only"),
        ("popax.population.step", "def f():\n    from popax.store import catalog", "imports go down only"),
        ("popax.adapters.base", "from popax.modeling.config import ModelConfig", "imports go down only"),
        ("popax.adapters.base", "from popax.adapters.lora import LORA", "imports go down only"),
        ("popax.store.extract", "from ..training.loop import run", "imports go down only"),
        ("popax.training.loop", "import gin", "only the doors"),
        ("popax.training.loop", "from gin import config", "only the doors"),
        ("popax.population.step", "from popax.kernels.lora import api", "only adapters, modeling's attention"),
        ("popax.modeling.layers", "import popax.kernels.lora.api", "only adapters, modeling's attention"),
        ("popax.kernels.lora.api", "import optax", "kernels know jax"),
        ("popax.kernels.lora.api", "import popax.sharding", "imports go down only"),
        ("popax.surprise.thing", "import popax.types", "stands on no floor"),
        ("popax.data.utils", "", "named after what it holds"),
        ("popax.data.reader", "import threading\nstate = threading.local()", "threading.local"),
        ("popax.data.reader", "from threading import local", "threading.local"),
        ("popax.data.reader", "x = 1\n" * 301, "the limit is 300"),
        ("popax.kernels.lora.api", "x = 1\n" * 401, "the limit is 400"),
    ],
)
def test_an_offending_file_is_found(module, source, message):
    found = violations(BASE | {module: source})
    assert len(found) == 1
    assert message in found[0]
    assert module in found[0]


def test_a_cycle_is_found():
    found = violations(BASE | {"popax.data.a": "from popax.data import b", "popax.data.b": "import popax.data.a"})
    assert found == ["import cycle: popax.data.a -> popax.data.b -> popax.data.a"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("popax.cli.gin_door", "import gin\nfrom popax.training import loop"),
        ("popax.adapters.lora", "from popax.kernels.stacked_lora import api\nfrom .base import AdapterConfig"),
        ("popax.modeling.attention", "from popax.kernels.attention import api"),
        ("popax.modeling.loss", "from popax.kernels.cross_entropy import token_nll"),
        ("popax.kernels.lora.vjp", "import math\nimport jax.numpy as jnp\nfrom popax.errors import ConfigError"),
        ("popax.store.extract", "from popax.population.state import PopulationState\nimport popax"),
        ("popax.bench.train", "from popax.training import loop"),
        ("popax.population.step", "from popax.objectives.base import Objective"),
    ],
)
def test_a_proper_file_passes(module, source):
    assert violations(BASE | {module: source}) == []


def loops_over_steps(source: str) -> list[int]:
    """Lines of loops whose body calls something named `step`, `step_fn`, `_step`, `member_update`: of training."""
    found = []
    for loop in ast.walk(ast.parse(source)):
        if isinstance(loop, ast.For | ast.While):
            calls = [node.func for node in ast.walk(loop) if isinstance(node, ast.Call)]
            names = {func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "") for func in calls}
            if names & {"step", "step_fn", "_step", "member_update", "population_step", "member_step"}:
                found.append(loop.lineno)
    return found


def callers_of(name: str) -> set[str]:
    return {
        module
        for module, source in popax_sources().items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) == name
    }


def test_there_is_one_training_loop():
    assert callers_of("member_update") == {"popax.population.step"}
    builders = callers_of("population_step")
    assert builders == {"popax.training.compiled", "popax.training.distill", "popax.plan.steps"}
    # Benchmarks time one step over and over, serving's steps make tokens, and a classifier of features is no adapter.
    others = ("popax.bench.train", "popax.bench.train_methods", "popax.serving", "popax.evaluation.dispatch")
    looping = {module for module, source in popax_sources().items() if loops_over_steps(source)}
    assert {module for module in looping if not any(inside(module, other) for other in others)} == {
        "popax.training.fit"
    }


@pytest.mark.parametrize("source", ["for i in x:\n    s = programs.step(s)", "while True:\n    s, _ = self._step(s)"])
def test_a_second_loop_is_seen(source):
    assert loops_over_steps(source)
