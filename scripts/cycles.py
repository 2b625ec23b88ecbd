"""Find import cycles of the package and of the page's source; exit with 1 if there are any.

    python scripts/cycles.py [--only python|typescript] [--root DIR]

Python: cycles among the modules of each folder of `src/crosslayer` (import-linter checks those across folders).
Imports inside functions count, imports under `if TYPE_CHECKING:` do not.
TypeScript: cycles among `web/src/**/*.ts` by relative imports. Type-only imports do not count.
Needs only the standard library, and no Node.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

Graph = Mapping[str, set[str]]

PACKAGE = Path("src/crosslayer")
WEB = Path("web/src")

# `import a, { type B } from "./c"`, `export * from "./c"`. The clause holds no `=`, so `export const a = "./c"` does
# not match.
CLAUSE = r"(type\s+)?([\w$*{}\s,]+?)"
FROM = re.compile(rf"""^(?:import|export)\s+{CLAUSE}\s*from\s*["'](\.[^"']*)["']""", re.MULTILINE)
BARE = re.compile(r"""^import\s*["'](\.[^"']*)["']""", re.MULTILINE)
DYNAMIC = re.compile(r"""\bimport\(\s*["'](\.[^"']*)["']""")
COMMENT_LINE = re.compile(r"^\s*//.*$", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", choices=["python", "typescript"], help="default: both")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="root of the repository")
    args = parser.parse_args()
    graphs = []
    if args.only != "typescript":
        graphs += python_imports(args.root / PACKAGE)
    if args.only != "python":
        graphs.append(typescript_imports(args.root / WEB))
    if not all(graphs):
        sys.exit(f"no sources below {args.root}; give the repository's folder as --root")
    found = [cycle for graph in graphs for cycle in cycles(graph)]
    for cycle in found:
        print(" -> ".join([*cycle, cycle[0]]))
    modules = sum(map(len, graphs))
    print(f"{len(found)} import cycle{'' if len(found) == 1 else 's'} among {modules} modules")
    sys.exit(bool(found))


def cycles(graph: Graph) -> list[tuple[str, ...]]:
    """Return a shortest cycle through each import that is on one; each cycle once, starting with its first name."""
    found = set()
    for start in graph:
        for end in graph[start]:
            path = _shortest(graph, end, start)
            if path is not None:
                first = path.index(min(path))
                found.add((*path[first:], *path[:first]))
    return sorted(found)


def _shortest(graph: Graph, start: str, end: str) -> list[str] | None:
    paths = {start: [start]}
    queue = deque([start])
    while queue:
        at = queue.popleft()
        if at == end:
            return paths[at]
        for other in sorted(graph[at]):
            if other not in paths:
                paths[other] = [*paths[at], other]
                queue.append(other)
    return None


def python_imports(package: Path) -> list[Graph]:
    """Map the imports among modules within each folder of a package, and among the modules beside them."""
    modules = {_module(package, path): path for path in sorted(package.rglob("*.py"))}
    folders: dict[str, dict[str, Path]] = {}
    for name, path in modules.items():
        inside = path.relative_to(package).parts
        folders.setdefault(inside[0] if len(inside) > 1 else "", {})[name] = path
    # A module that imports itself through its package's name is not a cycle.
    return [
        {
            name: {m for m in _imported(name, path, modules) if m in folder and m != name}
            for name, path in folder.items()
        }
        for folder in folders.values()
    ] or [{}]


def _module(package: Path, path: Path) -> str:
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(name: str, path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    for node in _run(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [*name.split("."), *(["__init__"] if path.name == "__init__.py" else [])]
            above = parts[: len(parts) - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                # A name is a module of the package, or is defined in the package's own file.
                whole = f"{base}.{alias.name}"
                yield whole if whole in modules else base


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes except those under `if TYPE_CHECKING:`."""
    yield node
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children = node.orelse
    for child in children:
        yield from _run(child)


def typescript_imports(source: Path) -> Graph:
    """Map the imports among the files, by name without suffix."""
    files = {path.relative_to(source).with_suffix("").as_posix(): path for path in sorted(source.rglob("*.ts"))}
    return {name: {_resolved(path, target, source, files) for target in _targets(path)} for name, path in files.items()}


def _targets(path: Path) -> Iterator[str]:
    text = COMMENT_LINE.sub("", path.read_text(encoding="utf-8"))
    for types, clause, target in FROM.findall(text):
        if not types and not _only_types(clause):
            yield target
    yield from BARE.findall(text)
    yield from DYNAMIC.findall(text)


def _only_types(clause: str) -> bool:
    """Return whether a clause is `{ type A, type B }`, which the compiler drops."""
    names = clause.strip()
    if not (names.startswith("{") and names.endswith("}")):
        return False
    return all(name.split()[0] == "type" and len(name.split()) > 1 for name in names[1:-1].split(",") if name.strip())


def _resolved(path: Path, target: str, source: Path, files: Mapping[str, Path]) -> str:
    goal = (path.parent / target).resolve()
    base = source.resolve()
    for candidate in (goal, goal.with_suffix(""), goal / "index"):
        if candidate.is_relative_to(base) and (name := candidate.relative_to(base).as_posix()) in files:
            return name
    sys.exit(f"{path} imports {target!r}, which is no file of {source}; correct the import")


if __name__ == "__main__":
    main()
