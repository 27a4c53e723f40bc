"""The dependency rule of the layers, held by walking every import."""

import ast
import sys
from pathlib import Path

from tests.loops import for_each

SRC = Path(__file__).parents[1] / "src"
ENTRY_POINTS = {p.stem for p in SRC.glob("*.py") if 'if __name__ == "__main__"' in p.read_text()}
STANDARD = set(sys.stdlib_module_names)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of it, in full."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            module = node.module or ""
            # `from src.models import mlp` imports src.models.mlp as much as src.models.
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names if module.startswith("src")}
    return names


def foreign(path: Path) -> set[str]:
    """The top-level packages outside the project and the standard library."""
    return {name.split(".")[0] for name in imports(path)} - STANDARD - {"src"}


def own(path: Path) -> set[str]:
    """The project's modules that a file imports."""
    return {name for name in imports(path) if name.startswith("src.")}


FILES = sorted(SRC.rglob("*.py"))


def test_entry_points_are_found():
    assert {"train", "sample", "schedules"} <= ENTRY_POINTS


@for_each("path", [f for f in FILES if f.parent.name in ("diffusion", "models")])
def test_mathematics_and_networks_need_torch_alone(path):
    assert foreign(path) <= {"torch"}
    layer = path.parent.name
    assert all(name.startswith(f"src.{layer}") for name in own(path)), own(path)


@for_each("path", [f for f in FILES if f.parent.name in ("data", "metrics")])
def test_data_and_metrics_know_neither_mathematics_nor_networks(path):
    assert not any(name.startswith(("src.diffusion", "src.models", "src.module", "src.runs")) for name in own(path))


def test_module_is_given_its_network_and_its_data():
    assert not any(name.startswith("src.models") for name in own(SRC / "module.py"))
    assert {n for n in own(SRC / "module.py") if n.startswith("src.data")} <= {
        "src.data.batch",
        "src.data.batch.Batch",
        "src.data.batch.VALIDATION",
    }


@for_each("path", FILES)
def test_configuration_stays_at_the_edge(path):
    edge = {"after_sweep", "arguments", "building", "checkpoints", "cli", "errors", "out_of_memory", "overrides"}
    edge |= {"output", "resolvers", "resuming", "runs", *ENTRY_POINTS}
    if path.parent == SRC and path.stem in edge:
        return
    assert not foreign(path) & {"hydra", "omegaconf"}


@for_each("path", FILES)
def test_nothing_imports_an_entry_point(path):
    entries = {f"src.{name}" for name in ENTRY_POINTS}
    assert not own(path) & entries


@for_each("path", [f for f in FILES if f.parent != SRC])
def test_nothing_below_the_commands_prints(path):
    calls = [
        n.func.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and hasattr(n.func, "id")
    ]
    assert "print" not in calls
