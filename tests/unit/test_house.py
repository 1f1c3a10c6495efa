"""The house rules, held by reading the source: imports go down, files stay short, nothing from a file is ever executed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "trocar"

# floor by room: a room may import rooms below it and itself, nothing beside or above it. A room is a folder or a file of src/trocar.
FLOORS = {
    "core": 0,
    "anatomy": 1,
    "trace": 2,
    "patch": 3,
    "locate": 3,
    "evaluate": 3,
    "method": 4,
    "fitting": 4,
    "adapted": 4,
    "result": 4,
    "edit": 5,
    "adapt": 5,
    "align": 5,
    "compress": 5,
    "lab": 5,
    "recipe": 6,
    "report": 6,
    "cli": 7,
}
# no rooms: the version, and `python -m trocar`
BASEMENT = {"__init__", "__main__"}
# what methods exchange is written down on floor 4; floors below may name those types, and only for the type checker
EXCHANGED = {"method"}
# files whose own closed table says what they import
TABLES = {"core/lazy.py", "recipe/registry.py"}
MEGABYTE = 10**6
WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx", ".npz"}
EXCERPTS = {".png", ".jpg", ".jpeg", ".parquet", ".jsonl", ".arrow", ".csv", ".tsv"}
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".jinja", ".html", ".css", ".js", ".csv", ".cfg", ".sh", ""}

MODULES = sorted(SRC.rglob("*.py"))


def tracked() -> list[Path]:
    """Files that git tracks or would track; outside a git checkout (an unpacked archive), everything but hidden folders and builds."""
    found = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode == 0 and found.stdout:
        return [ROOT / name for name in sorted(set(found.stdout.split("\0"))) if name and (ROOT / name).is_file()]
    skipped = {"site", "runs", "build", "dist", "__pycache__"}
    every = (path for path in ROOT.rglob("*") if path.is_file())
    return [path for path in every if not any(part.startswith(".") or part in skipped for part in path.relative_to(ROOT).parts)]


def room(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every room of trocar that a file imports, at whatever depth, also for type checking only (but then not the exchanged types)."""
    package = ["trocar", *path.relative_to(SRC).with_suffix("").parts][:-1]
    module_tree = tree(path)
    guards = [node for node in ast.walk(module_tree) if isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING")]
    for_types = {id(inner) for guard in guards for statement in guard.body for inner in ast.walk(statement)}
    for node in ast.walk(module_tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "trocar" else [module]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "trocar" and len(parts) > 1 and not (id(node) in for_types and parts[1] in EXCHANGED):
                yield parts[1], node.lineno


def broken_imports(path: Path, floors: dict[str, int]) -> list[str]:
    here = room(path)
    return [
        f"{path.relative_to(ROOT)}:{line} imports trocar.{other} (floor {floors.get(other, '?')}) from floor {floors[here]}"
        for other, line in imports(path)
        if other != here and not other.startswith("__") and floors.get(other, 99) >= floors[here]
    ]


def test_every_room_has_a_floor_and_the_architecture_says_the_same() -> None:
    rooms = {room(path) for path in MODULES} - BASEMENT
    assert rooms <= set(FLOORS), f"{sorted(rooms - set(FLOORS))} need a floor here and in docs/architecture.md"
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    written = {name.removesuffix(".py"): int(floor) for floor, names in rows for name in re.findall(r"`([\w.]+)`", names)}
    assert written == FLOORS


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) not in BASEMENT], ids=lambda path: str(path.relative_to(SRC)))
def test_imports_only_go_down(path: Path) -> None:
    assert not broken_imports(path, FLOORS)


def test_the_import_rule_can_fail() -> None:
    path = SRC / "core" / "errors.py"
    assert not broken_imports(path, FLOORS)
    config = SRC / "core" / "config.py"
    assert ("core", 9) in {(name, 9) for name, _ in imports(config)}
    upward = SRC / "method.py"
    assert broken_imports(upward, {**FLOORS, "method": 0})


@pytest.mark.parametrize("package", ["edit", "adapt", "align", "compress"])
def test_methods_do_not_import_each_other(package: str) -> None:
    """Modules of one method room that belong to different methods share nothing but what lies below them."""
    for path in MODULES:
        if room(path) != package:
            continue
        method = path.relative_to(SRC / package).parts[0].removesuffix(".py")
        if method == "__init__":
            continue
        for node in ast.walk(tree(path)):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module and module.startswith(f"trocar.{package}."):
                assert module.split(".")[2] == method, f"{path.relative_to(ROOT)}:{node.lineno} imports another method, {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SRC)))
def test_source_files_are_short_and_say_what_they_are(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{lines} lines; split it"
    if not (path.name.startswith("_") and path.name != "__init__.py"):
        assert (ast.get_docstring(tree(path)) or "").strip(), "a public module needs a docstring that says what it is for"


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) not in BASEMENT], ids=lambda path: str(path.relative_to(SRC)))
def test_docstrings_name_the_right_floor(path: Path) -> None:
    """A module need not say on which floor it stands, but must not say another one."""
    named = re.findall(r"\bFloor (\d)\b", ast.get_docstring(tree(path)) or "")
    assert set(named) <= {str(FLOORS[room(path)])}


FORBIDDEN_CALLS = {
    "eval": "executes text",
    "exec": "executes text",
    "compile": "executes text",
    "torch.load": "unpickles; use safetensors",
    "yaml.load": "can build any object; use yaml.safe_load",
    "yaml.unsafe_load": "can build any object; use yaml.safe_load",
    "numpy.load": "may unpickle; use safetensors",
    "np.load": "may unpickle; use safetensors",
    "pickle.load": "executes what it reads",
    "pickle.loads": "executes what it reads",
    "shutil.unpack_archive": "archives are never unpacked",
    "os.system": "runs a shell",
}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile", "zipfile"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def written_here(argument: ast.expr) -> bool:
    """A module's name that no file can supply: a constant, or an f-string that can only lead into this package."""
    return isinstance(argument, ast.Constant) or ast.unparse(argument)[2:].startswith(("{__name__}.", "trocar."))


def unsafe(module: ast.Module, table: bool = False) -> list[str]:
    """Everything in a file that could run code from data, or ties it to one kind of device."""
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in FORBIDDEN_CALLS:
            found.append(f"{node.lineno}: {name}() {FORBIDDEN_CALLS[name]}")
        if name in {"__import__", "importlib.import_module", "import_module"} and not (table or all(map(written_here, node.args))):
            found.append(f"{node.lineno}: {name}() with a name that is not written here")
        if name == "lazy" and [ast.unparse(argument) for argument in node.args] != ["__name__", "_HOMES"]:
            found.append(f"{node.lineno}: lazy() with other than the package's own table")
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda" and not dotted(node.func).startswith("torch.cuda"):
            found.append(f"{node.lineno}: .cuda(); use the model's device")
        for keyword in node.keywords:
            constant = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg == "trust_remote_code" and constant is True:
                found.append(f"{node.lineno}: trust_remote_code=True")
            if keyword.arg == "shell" and constant is True:
                found.append(f"{node.lineno}: shell=True")
            if keyword.arg == "allow_pickle" and constant is not False:
                found.append(f"{node.lineno}: allow_pickle")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SRC)))
def test_nothing_from_a_file_is_executed_and_no_device_is_assumed(path: Path) -> None:
    assert not unsafe(tree(path), table=path.relative_to(SRC).as_posix() in TABLES)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from tarfile import open",
        "torch.load(path)",
        "eval(text)",
        "importlib.import_module(header['kind'])",
        "__import__(name)",
        "lazy(__name__, header)",
        "model.cuda()",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "np.load(x, allow_pickle=True)",
        "yaml.load(text)",
    ],
)
def test_the_safety_rule_can_fail(code: str) -> None:
    assert unsafe(ast.parse(code))


def test_harmless_code_passes_the_safety_rule() -> None:
    code = ["importlib.import_module('trocar.edit')", "import_module(f'{__name__}.{HOME[name]}')", "import_module(f'trocar.lab.{module}')"]
    code += ["torch.cuda.synchronize()", "model.eval()", "yaml.safe_load(x)", "re.compile(x)"]
    assert not unsafe(ast.parse("\n".join(code)))


# written in pieces, so that this file does not find itself
ELSEWHERE = {
    "a package registry's address": re.compile(
        "|".join(["pypi" + r"\.org", "pythonhosted" + r"\.org", "registry" + r"\.npmjs", "download" + r"\.pytorch"])
    ),
    "an absolute path of one machine": re.compile(
        r"(?<![\w.:/~$}])/(?:" + "|".join(["work", "home", "root", "Users", "opt", "mnt", "tmp"]) + r")/[\w.]"
    ),
    "a package index option": re.compile("--(?:extra-)?index" + "-url|--find" + "-links"),
}


def test_tracked_files_name_no_registry_and_no_machine() -> None:
    found = []
    for path in tracked():
        if path.suffix not in TEXT or path.name == "LICENSE":
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            found += [f"{path.relative_to(ROOT)}:{number}: {what}" for what, pattern in ELSEWHERE.items() if pattern.search(line)]
    assert not found


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a package registry's address", "pip install -i https://download" + ".pytorch.org/whl/cpu"),
        ("an absolute path of one machine", "DATA = '/ho" + "me/me/data'"),
        ("a package index option", "pip install --index" + "-url x"),
    ],
)
def test_the_address_rule_can_fail(what: str, text: str) -> None:
    assert ELSEWHERE[what].search(text)
    assert not ELSEWHERE[what].search("https://example.org/home/page ~/work/x $HOME/tmp/x ../shared/data src/work/x")


def test_repository_stays_within_its_budget() -> None:
    """Weights 25 MB over all methods, excerpts of data 1 MB (fixtures and packaged data that are not weights; not the docs' pictures)."""
    files = tracked()
    data = [path for path in files if path.suffix in EXCERPTS and not path.is_relative_to(ROOT / "docs")]
    weights = sum(path.stat().st_size for path in files if path.suffix in WEIGHTS)
    excerpts = sum(path.stat().st_size for path in data)
    assert weights <= 25 * MEGABYTE, f"weights take {weights / MEGABYTE:.1f} MB"
    assert excerpts <= 1 * MEGABYTE, f"excerpts of data take {excerpts / MEGABYTE:.2f} MB"
    for path in files:
        assert path.suffix not in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}, f"{path.relative_to(ROOT)}: weights are stored as safetensors"


HELP = """
import sys
from trocar.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
sys.exit("torch was imported" if "torch" in sys.modules else 0)
"""


@pytest.mark.skipif(not (SRC / "cli").exists() and not (SRC / "cli.py").exists(), reason="the command line is not there")
def test_help_reaches_the_user_without_torch() -> None:
    """A module-level import of torch anywhere on the path of `trocar --help` would show here."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
