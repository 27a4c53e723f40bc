"""The rules of the layers, checked on every import: one test per rule, which lists all offenders."""

import ast
import sys
from functools import cache
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"
FILES = sorted(SRC.rglob("*.py"))
COMMANDS = {p.stem for p in SRC.glob("*.py") if 'if __name__ == "__main__"' in p.read_text()}
STANDARD = set(sys.stdlib_module_names)
LAYERS = (
    {"errors", "rng", "cache", "src", "diffusion", "models", "distributed", "viz"},
    {"data", "metrics", "interop"},
    {"training", "config"},
    {"evaluation"},
    {"runs"},
    {"comparison"},
    COMMANDS,
)
"""Folders and modules of src; each imports only from layers below its own (docs/design.md)."""


@cache
def imports(path: Path) -> set[str]:
    """Return the full name of every module that a file imports, inside functions and for type checking too."""
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


def third_party(path: Path) -> set[str]:
    """Return the top-level packages outside the project and the standard library."""
    return {name.split(".")[0] for name in imports(path)} - STANDARD - {"src"}


def package_of(path: Path) -> str:
    """Return the folder or module of src that a file belongs to."""
    return path.relative_to(SRC).with_suffix("").parts[0]


def packages_imported(path: Path) -> set[str]:
    """Return the other folders and modules of src that a file imports from."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("src.")} - {package_of(path)}


def offenders(rule: object) -> list[str]:
    assert callable(rule)
    return [f"{p.relative_to(SRC)}: {names}" for p in FILES if (names := rule(p))]


def test_every_package_has_a_layer():
    packages = {package_of(p) for p in FILES} - {"__init__"}
    assert packages == set().union(*LAYERS)


def test_imports_point_to_lower_layers_only():
    layer = {package: k for k, packages in enumerate(LAYERS) for package in packages}

    def rule(path):
        if path == SRC / "__init__.py":
            return set()
        return {package for package in packages_imported(path) if layer[package] >= layer[package_of(path)]}

    assert offenders(rule) == []


def test_imports_have_no_cycles():
    graph = {}
    for path in FILES:
        name = ".".join(("src", *path.relative_to(SRC).with_suffix("").parts)).removesuffix(".__init__")
        graph[name] = imports(path)
    graph = {name: (targets & set(graph)) - {name, "src"} for name, targets in graph.items()}
    remaining = dict(graph)
    while leaves := [name for name, targets in remaining.items() if not targets & set(remaining)]:
        for name in leaves:
            del remaining[name]
    assert remaining == {}


def test_mathematics_and_networks_need_torch_only():
    def rule(path):
        return third_party(path) - {"torch"} if package_of(path) in ("diffusion", "models") else set()

    assert offenders(rule) == []


def test_hydra_appears_only_in_config_runs_and_commands():
    def rule(path):
        allowed = {"config", "runs", "comparison", *COMMANDS}
        return set() if package_of(path) in allowed else third_party(path) & {"hydra", "omegaconf"}

    assert offenders(rule) == []


def test_errors_need_only_the_standard_library():
    assert imports(SRC / "errors.py") <= STANDARD | {"collections.abc"}


def test_configuration_imports_no_torch_at_its_top():
    def rule(path):
        top = ast.parse(path.read_text()).body
        names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
        return (
            {n for n in names if n.split(".")[0] in ("torch", "lightning")} if package_of(path) == "config" else set()
        )

    assert offenders(rule) == []


def test_only_commands_and_their_launcher_print():
    def rule(path):
        calls = {
            n.func.id
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call) and hasattr(n.func, "id")
        }
        # sample_*.py are commands, too: an export copies them next to the network
        speaks = path.parent == SRC or path == SRC / "config" / "cli.py" or path.match("interop/sample_*.py")
        return set() if speaks else calls & {"print"}

    assert offenders(rule) == []
