"""The house's floors: a module imports from its own part and from lower floors only, lazily or not. One module alone
spells the names of files and folders that calib writes."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = (
    {"errors", "layout", "progress"},
    {"files", "documents", "lookup", "client", "tables"},
    {"registry", "settings", "annotations", "boxes", "losses", "pickles", "parallel"},
    {"storage", "checkpoint", "arrow"},
    {"cache"},
    {"sampling", "evaluate", "analysis"},
    {"heads", "data"},
    {"artifact"},
    {"training", "score"},
    {"methods", "export"},
    {"extract"},
    {"decide", "doctor", "report", "tiles"},
    {"tune"},
    {"improve", "notebook"},
    {"demo"},
    {"server", "cli"},
)
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}
FOLDERS = {"calib": ROOT / "calib", "calib.cli": ROOT / "cli", "calib.server": ROOT / "server"}
# Imported inside functions of the one module that is about them.
GUESTS = {
    "torchvision": {"calib.extract.torchvision", "calib.extract.torchvision_dense", "calib.data.detector"},
    "onnx": {"calib.export.graph"},
    "onnxscript": {"calib.export.graph"},
    "onnxruntime": {"calib.export.graph"},
    "mmdet": {"calib.extract.mmdet"},
    "detectron2": {"calib.extract.detectron2", "calib.extract.detectron2_open"},
    "transformers": {"calib.extract.transformers_open"},
    "ultralytics": {"calib.extract.ultralytics"},
    "matplotlib": {"calib.demo.plots"},
    "duckdb": {"calib.analysis.query", "calib.analysis.views", "calib.evaluate.results"},
    "fsspec": {"calib.storage.location"},
    "httpx": {"calib.client"},
    "sklearn": {"calib.decide.confidence"},
    "tqdm": {"calib.notebook"},
    "optuna": {"calib.tune.study"},
    "fastapi": {"calib.server.*"},
    "prometheus_client": {"calib.server.layers.metrics", "calib.server.routes"},
    "ray": {"calib.parallel.ray_engine"},
    "typer": {"calib.cli.*"},
}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), path


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(name: str, path: Path) -> tuple[str, ...]:
    return tuple(_imports(name, path))


def _imports(name: str, path: Path) -> Iterator[str]:
    """Absolute names of everything that ``path`` imports, anywhere in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            # "from . import data" names modules, "from calib.cache import Cache" names things of a module.
            yield from ([source] if node.module else [f"{source}.{alias.name}" for alias in node.names])


MODULES = dict(modules())
LAYOUT = "calib.layout"
SPELLED = {  # by module, names that mean something else there
    "calib.cli.extract": {"1"},  # the share 0/1
    "calib.cli.report": {"report.html"},  # the page of a user, not that of a run
    "calib.extract.proof": {"cache"},  # in a temporary folder
    "calib.server.shared": {"models"},  # copies that workers share, not a folder of heads
}


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("name", [m for m in MODULES if part(m)])
def test_a_module_imports_only_from_its_part_and_below(name: str) -> None:
    assert part(name) in FLOOR, f"{name} stands on no floor: add it to FLOORS"
    for imported in imports(name, MODULES[name]):
        if not imported.startswith("calib.") or part(imported) == part(name):
            continue
        above = FLOOR[part(imported)] >= FLOOR[part(name)]
        assert not above, f"{name} (floor {FLOOR[part(name)]}) imports {imported} (floor {FLOOR[part(imported)]})"


def test_there_are_no_circular_imports() -> None:
    """Over imports anywhere in modules but those for types alone; a package's ``__init__`` counts as part of the module
    that needs it."""
    graph = {n: {i for i in _imported(n, p) if i in MODULES} for n, p in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circular import: {' -> '.join((*path[path.index(name) :], name))}"
        if name in done:
            return
        for imported in graph[name]:
            visit(imported, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def _imported(name: str, path: Path) -> set[str]:
    tree = parsed(path)
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in for_types:
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return found - {name, package}


@pytest.mark.parametrize("guest", GUESTS)
def test_frameworks_stay_where_they_are_needed(guest: str) -> None:
    for name, path in MODULES.items():
        if any(i.split(".")[0] == guest for i in imports(name, path)):
            allowed = GUESTS[guest]
            assert name in allowed or f"{'.'.join(name.split('.')[:2])}.*" in allowed, f"{name} imports {guest}"


def literals(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Strings but for docstrings; ``{}`` stands for what an f-string puts in."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):  # outer nodes come before inner ones
        if isinstance(node, ast.Expr):
            skipped.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            skipped |= {n for n in ast.walk(node) if isinstance(n, ast.JoinedStr)} | set(node.values)
            yield node, "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node, node.value


def path_parts(tree: ast.Module) -> set[ast.AST]:
    """What is joined to a path, or compared with a part of one."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        match node:
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                found |= {left, right}
            case ast.Call(func=ast.Name(id="Path") | ast.Attribute(attr="joinpath" | "with_name"), args=args):
                found |= set(args)
            case ast.Compare(left=ast.Attribute(attr="name"), comparators=[other]):
                found.add(other)
    return found


NAMES = {part for _, text in literals(parsed(MODULES[LAYOUT])) for part in text.split("/") if not part.startswith("{}")}


def spelled(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name. A sentence may mention one, and so may a URL; a plain word, such as a key of JSON, is a name only
    where it is part of a path."""
    paths = path_parts(tree)
    for node, text in literals(tree):
        if text.startswith("/") or len(text.split()) != 1:
            continue
        is_path = "/" in text or node in paths
        yield from (
            (node.lineno, part) for part in text.split("/") if part in NAMES and (is_path or not part.isalnum())
        )


@pytest.mark.parametrize("name", [m for m in MODULES if m != LAYOUT])
def test_names_of_files_are_spelled_in_one_module(name: str) -> None:
    found = [f"line {n}: {what}" for n, what in spelled(parsed(MODULES[name])) if what not in SPELLED.get(name, set())]
    assert not found, f"{name} spells names that stand in {LAYOUT}: {', '.join(found)}"


def test_a_name_that_is_spelled_elsewhere_is_found() -> None:
    lines = {
        'path / "shards"': True,
        'manifest["shards"]': False,
        'f"shards/{name}/x"': True,
        'f"$OUT/{x}/caches/train"': True,
        'p.name != "lock"': True,
        'f".{name}.training"': True,
        'x = "head.json"': True,
        '"""head.json"""': False,
        'print("no head.json")': False,
        '"/v2/models"': False,
    }
    assert {line: bool(list(spelled(ast.parse(line)))) for line in lines} == lines


@pytest.mark.parametrize("name", list(MODULES))
def test_a_module_says_what_it_is_and_fits_on_a_few_screens(name: str) -> None:
    text = MODULES[name].read_text()
    assert ast.get_docstring(parsed(MODULES[name])), f"{name} has no docstring"
    assert len(text.splitlines()) <= 400, f"{name} has {len(text.splitlines())} lines: divide it"
    for node in ast.walk(parsed(MODULES[name])):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno
            assert length <= 80, f"{name}.{node.name} has {length} lines"
