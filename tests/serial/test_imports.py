"""No module of the package imports itself in a circle, be it by an import inside a function."""

import ast
from collections.abc import Iterator
from pathlib import Path

import mlm_mpi

ROOT = Path(mlm_mpi.__file__).parent


def modules() -> dict[str, Path]:
    """name -> file."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = (ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement, at any depth, but for those that only type checkers see."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    seen_by_checkers = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    for child in node.orelse if seen_by_checkers else ast.iter_child_nodes(node):
        yield from imports(child)


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules that a module names: of `from a import b` a.b where that is a module, else a."""
    found = set()
    for node in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            full = {f"{source}.{alias.name}" for alias in node.names}
            found |= {each if each in known else source for each in full}
    return found & known


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules of which each reaches all others (Tarjan's strongly connected components), by name."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            at = stack.index(name)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1 or name in graph[name]:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return found


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": set(), "f": {"f"}}) == [
        ["a", "b", "c"], ["f"],
    ]  # fmt: skip
    lines = "if TYPE_CHECKING:\n import a\nelse:\n import b\ndef f():\n try:\n  from c import d\n finally:\n  pass"
    assert [ast.unparse(node) for node in imports(ast.parse(lines))] == ["import b", "from c import d"]


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = modules()
    graph = {name: imported(name, path, set(known)) for name, path in known.items()}
    assert graph["mlm_mpi.__main__"] >= {"mlm_mpi", "mlm_mpi.comm.launch", "mlm_mpi.errors"}
    assert circles(graph) == []
