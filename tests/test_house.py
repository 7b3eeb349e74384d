"""The rules of the house, read from the source: who imports whom, who knows array libraries,
which names of an array module are used, and that everything public says what it is."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import npdrt
from npdrt.optim import RULES

ROOT = Path(__file__).parents[1]
LINKED = ("models", "train", "data")  # folders of the root that install as npdrt.<name>


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its installed name."""
    found = {}
    for folder in (ROOT / "npdrt", *(ROOT / name for name in LINKED)):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:1] == ("npdrt",) and parts[1] in LINKED:
                continue  # seen through a link
            parts = parts if parts[0] == "npdrt" else ("npdrt", *parts)
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def test_the_whole_package_is_read() -> None:
    assert {"npdrt", "npdrt.arrays", "npdrt.ops.loss", "npdrt.models.mlp"} <= set(modules())
    assert len(modules()) > 30


# --- who may import whom ---------------------------------------------------------------------

LAYERS = (  # from the ground up; a module imports from its own layer and from those before it
    ("blas", "errors", "parallel", "plain", "progress", "workers"),
    ("cublas", "cudnn", "kernels", "launch", "owner", "philox", "regular", "schema"),
    ("atomic",),
    ("arrays", "compute", "elementary", "exact", "random", "slices", "sums"),
    ("autodiff",),
    ("check", "ops", "optim", "program"),
    ("data", "models", "store", "trust"),
    ("conform", "frechet", "train"),
    ("cli",),
)
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def test_contributing_says_the_same() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"```text\n(.*?)```", text, re.S)
    assert block is not None
    assert [tuple(line.split(", ")) for line in block[1].splitlines()] == [*reversed(LAYERS)]
    sentence = re.search(r"Only these modules ask which array library.*?\n\n", text, re.S)
    assert sentence is not None
    assert set(re.findall(r"`(npdrt\.[\w.]+)`", sentence[0])) == set(KNOWS_LIBRARIES)


def imports(tree: ast.Module) -> Iterator[str]:
    """The parts of npdrt that a module imports anywhere in it, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "npdrt":
            names = [f"npdrt.{npdrt._HOMES.get(alias.name, alias.name)}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [str(node.module)]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("npdrt."))


@pytest.mark.parametrize("module", [m for m in modules() if m.count(".")])
def test_imports_point_downwards(module: str) -> None:
    part = module.split(".")[1]
    if part == "__main__":
        return
    for imported in imports(modules()[module]):
        if not imported.startswith("__"):
            assert HEIGHT[imported] <= HEIGHT[part], f"{module} imports npdrt.{imported}"


# --- no circles ------------------------------------------------------------------------------


def imported_modules(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The modules of npdrt that a module imports anywhere in it: in functions, or for types only.

    Whoever imports a name of the package itself (`from npdrt import record`) uses the module that
    has it.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = npdrt._HOMES.get(alias.name, alias.name)
                home = f"npdrt.{name}" if node.module == "npdrt" else f"{node.module}.{alias.name}"
                yield from [m for m in (home, str(node.module)) if m in known][:1]


def circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """The largest sets of modules each of which imports every other, directly or not."""
    reached = {module: reachable(module, imports) for module in imports}
    found = [
        {other for other in reached[module] if module in reached[other]}
        for module in imports
        if module in reached[module]
    ]
    return [circle for k, circle in enumerate(found) if circle not in found[:k]]


def reachable(module: str, imports: dict[str, set[str]]) -> set[str]:
    """What a module imports, directly or not."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        new = imports[pending.pop()] - seen
        seen |= new
        pending += new
    return seen


def import_graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> the modules that it imports. The package itself stands above all others."""
    known = set(trees) - {"npdrt"}
    return {m: set(imported_modules(trees[m], known)) - {m} for m in known}


def test_no_module_imports_one_that_imports_it() -> None:
    assert list(circles(import_graph(modules()))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import npdrt.a.y",
        "from npdrt.a import y",
        "from npdrt.a.y import f",
        "def f():\n    from npdrt.a.y import f",
        "if TYPE_CHECKING:\n    from npdrt.a.y import T",
    ],
)
def test_circles_are_seen(source: str) -> None:
    texts = {"npdrt.a": "", "npdrt.a.x": source, "npdrt.a.y": "import npdrt.a.z",
             "npdrt.a.z": "from npdrt.a.x import g", "npdrt.a.w": "import npdrt.a.x"}  # fmt: skip
    trees = {name: ast.parse(text) for name, text in texts.items()}
    assert circles(import_graph(trees)) == [{"npdrt.a.x", "npdrt.a.y", "npdrt.a.z"}]


@pytest.mark.parametrize("module", modules())
def test_the_package_imports_nothing_of_the_tests(module: str) -> None:
    """The maker of the vectors, and mpmath which it needs, are not installed with npdrt."""
    names = {
        name.split(".")[0]
        for node in ast.walk(modules()[module])
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([str(node.module)] if isinstance(node, ast.ImportFrom) else
                     [alias.name for alias in node.names])
    }  # fmt: skip
    assert not names & {"tests", "oracle", "mpmath"}


# --- one file knows array libraries ----------------------------------------------------------

KNOWS_LIBRARIES = {
    "npdrt.arrays": "the one file that does",
    "npdrt.program.cuda": "replays programs on CuPy",
    "npdrt.store.container": "stores host arrays and says what else it was given",
}


def library_checks(tree: ast.Module) -> Iterator[str]:
    """Imports and names of CuPy, and questions about the library of an array."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names) if any(a.name.split(".")[0] == "cupy" for a in names):
                yield ast.unparse(node)
            case ast.ImportFrom(module=str(name)) if name.split(".")[0] == "cupy":
                yield ast.unparse(node)
            case ast.Attribute(value=ast.Name(id="cupy")):
                yield ast.unparse(node)
            case ast.Attribute(value=ast.Name(id="xp"), attr="__name__"):
                yield ast.unparse(node)
            case ast.Compare(left=ast.Name(id="xp")) | ast.Compare(comparators=[ast.Name(id="xp")]):
                yield ast.unparse(node)
            case ast.Call(func=ast.Name(id="isinstance"), args=[_, kind]):
                if "ndarray" in ast.unparse(kind):
                    yield ast.unparse(node)


@pytest.mark.parametrize("module", modules())
def test_no_library_checks(module: str) -> None:
    found = list(library_checks(modules()[module]))
    assert bool(found) == (module in KNOWS_LIBRARIES), found


@pytest.mark.parametrize(
    "source",
    [
        "import cupy",
        "from cupy.cuda import Stream",
        "def f():\n  import cupy as cp",
        "cupy.zeros(3)",
        "if xp is np: pass",
        "np is xp",
        "xp.__name__ == 'cupy'",
        "isinstance(x, np.ndarray)",
    ],
)
def test_library_checks_are_seen(source: str) -> None:
    assert list(library_checks(ast.parse(source)))


@pytest.mark.parametrize(
    "module", [m for m in modules() if m not in ("npdrt.arrays", "npdrt.slices")]
)
def test_products_are_made_by_one_function(module: str) -> None:
    """`npdrt.arrays.product`: CuPy's own could not be part of a CUDA graph, and rounds in another
    way than a replay. (`npdrt.slices` computes on NumPy alone.)"""
    assert "matmul" not in set(map(used_name, ast.walk(modules()[module])))


def test_products_are_seen() -> None:
    names = {used_name(node) for node in ast.walk(ast.parse("y = namespace(a).matmul(a, b)"))}
    assert "matmul" in names


# --- one file chooses the arithmetic ----------------------------------------------------------

OF_COMPUTE = {
    *("exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "logaddexp", "tanh", "sinh", "cosh"),
    *("sin", "cos", "tan", "pow", "power", "hypot", "square"),
    *("sum", "prod", "mean", "std", "var", "cumulative_sum", "cumsum"),
    *("dot", "vecdot", "tensordot", "einsum", "linalg"),
}
COMPUTES = {"dots", "has_kernels", "product", "total"}  # that npdrt.arrays has too
COMPUTING = [m for m in modules() if m.startswith("npdrt.ops.") or m == "npdrt.autodiff"]


def roundings(tree: ast.Module) -> Iterator[str]:
    """Calls whose bits the array library decides, and imports of them past `npdrt.compute`."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="xp" | "np") | ast.Call(), attr=name) if (
                name in OF_COMPUTE
            ):
                yield ast.unparse(node)
            case ast.BinOp(op=ast.MatMult()):
                yield ast.unparse(node)
            case ast.ImportFrom(module="npdrt.arrays", names=names):
                yield from sorted({a.name for a in names} & COMPUTES)


@pytest.mark.parametrize("module", COMPUTING)
def test_primitives_compute_in_the_chosen_arithmetic(module: str) -> None:
    assert not list(roundings(modules()[module]))


@pytest.mark.parametrize(
    "source",
    ["xp.exp(x)", "namespace(x).sum(x, axis=0)", "np.linalg.norm(x)", "a @ b", "xp.mean(x)",
     "from npdrt.arrays import namespace, total"],
)  # fmt: skip
def test_other_arithmetic_is_seen(source: str) -> None:
    assert list(roundings(ast.parse(source)))


# --- one file writes over files ---------------------------------------------------------------

WRITES_FILES = {
    "npdrt.atomic": "the one file that does",
    "npdrt.data.fetch": "downloads to a file that pooch made in a new folder",
    "npdrt.data.archive": "unpacks into a new folder",
    "npdrt.data.sample_images": "draws into a new folder, which then gets its name",
    "npdrt.regular": "opens a file for npdrt.atomic to append to",
    "npdrt.cli.common": "writes an archive in memory; opens the null device",
}
METHODS = {"rename", "write_text", "write_bytes", "hardlink_to", "symlink_to", "touch"}
OF_OS = {"rename", "replace", "link", "symlink", "truncate", "ftruncate", "mkfifo"}
MODULES = {"shutil": {"copy", "copy2", "copyfile", "move"}, "os": OF_OS}


def replacements(tree: ast.Module) -> Iterator[str]:
    """Calls that write over a file or give one another name."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=module), attr=name)) if (
                name in MODULES.get(module, ())
            ):
                yield ast.unparse(node)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="os"), attr="open")):
                if "O_RDONLY" not in ast.unparse(node):
                    yield ast.unparse(node)
            case ast.Call(func=ast.Attribute(attr=name)) if name in METHODS:
                yield ast.unparse(node)
            case ast.Call(func=ast.Attribute(attr="replace"), args=[_], keywords=[]):
                yield ast.unparse(node)  # of a path: of a string it has two arguments
            case ast.Call(
                func=ast.Name(id="open") | ast.Attribute(attr="open") | ast.Attribute(attr="File")
            ) if writes(node):
                yield ast.unparse(node)


def writes(call: ast.Call) -> bool:
    """Whether a call of `open` has a mode to write in, or one that cannot be seen."""
    method = isinstance(call.func, ast.Attribute) and call.func.attr == "open"
    modes = [
        *call.args[0 if method else 1 : 2],
        *(k.value for k in call.keywords if k.arg == "mode"),
    ]
    if not method and any(not isinstance(mode, ast.Constant) for mode in modes):
        return True
    texts = [str(mode.value) for mode in modes if isinstance(mode, ast.Constant)]
    return any(re.fullmatch(r"[rwaxbt+]{1,3}", text) and set(text) & set("wax+") for text in texts)


@pytest.mark.parametrize("module", modules())
def test_no_module_replaces_files(module: str) -> None:
    found = list(replacements(modules()[module]))
    assert bool(found) == (module in WRITES_FILES), found


@pytest.mark.parametrize(
    "source",
    [
        "path.replace(other)",
        "os.replace(a, b)",
        "path.rename(other)",
        "path.write_text('a')",
        "open(path, 'w')",
        "path.open('ab')",
        "path.open(mode='r+')",
        "open(path, how)",
        "h5py.File(path, 'a')",
        "os.open(path, flags)",
        "shutil.move(a, b)",
    ],
)
def test_replacements_are_seen(source: str) -> None:
    assert list(replacements(ast.parse(source)))


@pytest.mark.parametrize("source", ["text.replace('a', 'b')", "open(path, 'rb')", "path.open()"])
def test_reading_is_no_replacement(source: str) -> None:
    assert not list(replacements(ast.parse(source)))


# --- a rule is described in its own files -----------------------------------------------------


def rules_named(tree: ast.Module) -> set[str]:
    """The names of rules among the texts of a module; a docstring is one long text."""
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    return texts & set(RULES)


@pytest.mark.parametrize(
    "module", [m for m in modules() if m.startswith(("npdrt.cli", "npdrt.conform", "npdrt.optim."))]
)
def test_a_rule_is_named_in_its_own_files_alone(module: str) -> None:
    """What the product and the referee know of a rule is in npdrt/optim/<rule>.py and
    npdrt/conform/rules/<rule>.py; nothing else asks which rule it has."""
    own = {module.rpartition(".")[2]} if "rule" in module or "optim" in module else set()
    assert rules_named(modules()[module]) <= own


def test_named_rules_are_seen() -> None:
    assert rules_named(ast.parse('if rule in ("adam", "no rule"): pass')) == {"adam"}


# --- the names of the array module -----------------------------------------------------------


def uses() -> dict[str, set[str]]:
    """Every `xp.NAME`, and `namespace(...).NAME`, with the keywords it is called with."""
    found: dict[str, set[str]] = {}
    for node in (node for tree in modules().values() for node in ast.walk(tree)):
        name = used_name(node)
        if name:
            found.setdefault(name, set())
        if isinstance(node, ast.Call) and used_name(node.func):
            keywords = {k.arg for k in node.keywords if k.arg}
            found.setdefault(used_name(node.func), set()).update(keywords)
    return found


def used_name(node: ast.AST) -> str:
    match node:
        case ast.Attribute(value=ast.Name(id="xp"), attr=name):
            return "" if name.startswith("__") else name
        case ast.Attribute(value=ast.Call(func=ast.Name(id="namespace")), attr=name):
            return "" if name.startswith("__") else name
        case ast.Attribute(value=ast.Attribute() as inner, attr=name) if used_name(inner):
            return f"{used_name(inner)}.{name}"
    return ""


def resolve(library: ModuleType, name: str) -> Any:
    value: Any = library
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def refused_keywords(function: Any, keywords: set[str]) -> set[str]:
    """The keywords that `function` does not name, as far as Python can tell."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return set()
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return set()
    by_name = {name for name, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY}
    return keywords - by_name


# name -> why npdrt uses it although the standard has not got it
BEYOND_THE_STANDARD: dict[str, str] = {}


def lacks(library: ModuleType, exempt: dict[str, str]) -> list[str]:
    missing = [name for name in uses() if name not in exempt and resolve(library, name) is None]
    refused = [
        f"{name}({keyword}=)"
        for name, keywords in uses().items()
        if name not in missing
        for keyword in sorted(refused_keywords(resolve(library, name), keywords))
        if f"{name}({keyword}=)" not in exempt
    ]
    return missing + refused


def test_uses_are_seen() -> None:
    assert {"axis", "keepdims", "dtype"} <= uses()["sum"]
    assert {"exp", "where", "concat", "float64", "searchsorted"} <= set(uses())


def test_cupy_has_every_name_and_keyword() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
    assert lacks(cupy, {}) == []


def test_the_standard_has_every_name_and_keyword() -> None:
    strict = pytest.importorskip("array_api_strict")
    assert lacks(strict, BEYOND_THE_STANDARD) == []
    assert all(resolve(strict, name) is None for name in BEYOND_THE_STANDARD)


def test_numpy_has_every_name_and_keyword() -> None:
    assert lacks(np, {}) == []


def test_a_missing_name_or_keyword_is_seen() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)
    assert resolve(cupy, "isdtype")
    assert resolve(cupy, "no_such_function") is None
    assert refused_keywords(cupy.argsort, {"axis", "stable"}) == {"stable"}


# --- everything public says what it is -------------------------------------------------------


def undocumented(module: str, tree: ast.Module) -> Iterator[str]:
    """The module, and its public classes, functions and methods, that have no docstring."""
    if tree.body and not ast.get_docstring(tree):
        yield module
    pending: list[tuple[str, Any]] = [(module, tree)]
    while pending:
        owner, node = pending.pop()
        for item in node.body:
            if not isinstance(item, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if item.name.startswith("_"):
                continue
            if not ast.get_docstring(item):
                yield f"{owner}.{item.name}"
            if isinstance(item, ast.ClassDef):
                pending.append((f"{owner}.{item.name}", item))


@pytest.mark.parametrize("module", modules())
def test_everything_public_has_a_docstring(module: str) -> None:
    assert list(undocumented(module, modules()[module])) == []
