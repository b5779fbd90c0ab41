"""The shape of the project, held by machine: floors, sizes, banned words, mirrored tests, the README's tree.

The floors are also contracts of import-linter (pyproject.toml, run by scripts/check); static analysis misses what a
package's `__init__` drags in, so here the pure modules are really imported.
"""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("loong_jax", "pallas_kernels", "serving")
JAX = {"jax", "jaxlib", "flax", "orbax", "pallas_kernels"}

# Files that have no test of their own yet. It may only shrink.
UNTESTED: set[str] = set()
# Modules, or folders of them, that import an extra when they are used, and what uses them says so where it is not
# installed.
EXTRAS = {
    "loong_jax/grammar.py": {"llguidance"},
    "serving/grammar_checker.py": {"llguidance"},
    "loong_jax/sim/picture.py": {"matplotlib"},
    "serving/bench/": {"httpx", "matplotlib"},
    "serving/tracing.py": {"opentelemetry"},
    "serving/http/": {"prometheus_client", "pydantic", "pydantic_core", "starlette", "uvicorn"},
}
# Files past the limit because their one subject is a long list of records.
LONG_FILES = {"loong_jax/types.py"}


def tracked_files() -> list[str]:
    """Paths of the repository, relative to its root; without git (an unpacked archive), what lies there."""
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode == 0:
        return [path for path in git.stdout.splitlines() if (ROOT / path).exists()]
    roots = (*PACKAGES, "scripts", "tests", "docs")
    return [
        str(path.relative_to(ROOT)) for root in roots for path in sorted((ROOT / root).rglob("*")) if path.is_file()
    ]


FILES = tracked_files()
PACKAGE_FILES = [
    path for path in FILES if path.endswith(".py") and path.startswith(PACKAGES) and "_pb2" not in Path(path).name
]
SOURCE_FILES = [path for path in PACKAGE_FILES if Path(path).name != "__init__.py"]


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def module_name(path: str) -> str:
    return ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")


def parse(path: str) -> ast.Module:
    return ast.parse(read(path), path)


def functions(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def calls(tree: ast.Module) -> set[str]:
    """Names called, `a.b` for attributes of a name."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def data_plane() -> set[str]:
    """Children of loong_jax above the JAX line: the floors of pyproject.toml down to that of kv_pool."""
    contracts = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    (floors,) = (contract["layers"] for contract in contracts if contract["name"] == "floors of loong_jax")
    names = [re.findall(r"\w+", floor) for floor in floors]
    (line,) = (i for i, floor in enumerate(names) if "kv_pool" in floor)
    return {name for floor in names[: line + 1] for name in floor}


def test_pure_modules_do_not_load_jax() -> None:
    above = data_plane() - {"sim"}  # a driver, but of the virtual clock
    pure = [
        module_name(path)
        for path in PACKAGE_FILES
        if Path(path).parts[0] == "loong_jax" and Path(path).with_suffix("").parts[1] not in above
    ]
    assert "loong_jax.types" in pure
    program = f"""
import importlib, sys
for name in {pure!r}:
    importlib.import_module(name)
    loaded = {JAX!r} & set(sys.modules)
    if loaded: sys.exit(f"importing {{name}} loads {{sorted(loaded)}}")
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", PACKAGE_FILES)
def test_file_and_functions_fit(path: str) -> None:
    kernel = path.startswith("pallas_kernels/")
    max_file, max_function = (500, 150) if kernel else (400, 70)
    num_lines = len(read(path).splitlines())
    assert num_lines <= max_file or path in LONG_FILES, f"{num_lines} lines; a file has at most {max_file}"
    long = {f.name: size for f in functions(parse(path)) if (size := f.end_lineno - f.lineno + 1) > max_function}
    assert not long, f"functions have at most {max_function} lines"


@pytest.mark.parametrize("path", PACKAGE_FILES)
def test_no_banned_words(path: str) -> None:
    text, tree = read(path), parse(path)
    banned = {"breakpoint"} if path == "serving/cli.py" else {"print", "breakpoint"}
    assert not banned & calls(tree)
    assert "FIXME" not in text
    if path != "serving/cli.py":
        assert not re.search(r"\bos\.(environ|getenv|putenv)\b", text), "environment variables end at the command line"


@pytest.mark.parametrize("path", PACKAGE_FILES)
def test_module_says_what_it_is(path: str) -> None:
    if (ROOT / path).stat().st_size > 0:
        assert ast.get_docstring(parse(path)), "a module docstring says what the module is and is not"


def test_every_module_has_its_test() -> None:
    missing = {
        path
        for path in SOURCE_FILES
        if path.startswith(("loong_jax/", "serving/")) and not mirrored_test(path).exists()
    }
    assert missing == UNTESTED, "each module x.py has tests/.../test_x.py; UNTESTED may only shrink"


def mirrored_test(path: str) -> Path:
    return ROOT / "tests" / Path(path).parent / f"test_{Path(path).name}"


def test_every_op_has_a_reference() -> None:
    ops = {str(Path(path).parent) for path in PACKAGE_FILES if re.fullmatch(r"pallas_kernels/\w+/__init__\.py", path)}
    assert ops
    assert all(f"{op}/reference.py" in FILES for op in ops), ops


def test_imports_are_declared() -> None:
    """An installation without extras runs: every third-party import of the packages is in `dependencies`."""
    declared = {
        re.split(r"[\[>=;~ ]", line)[0] for line in tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]
    }
    distributions = metadata.packages_distributions()
    undeclared = {}
    for path in PACKAGE_FILES:
        for root in imported_roots(parse(path)) - set(sys.stdlib_module_names) - set(PACKAGES):
            names = {name.lower().replace("_", "-") for name in distributions.get(root, [root])}
            extra = any(path.startswith(place) and root in roots for place, roots in EXTRAS.items())
            if not names & declared and not extra:
                undeclared[root] = path
    assert not undeclared


def imported_roots(tree: ast.Module) -> set[str]:
    nodes = list(ast.walk(tree))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {
        name.split(".")[0] for name in plain | {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    }


def test_no_path_of_a_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:root|home|Users|work|mnt)/\w+")
    found = []
    for path in FILES:
        if Path(path).suffix in {".py", ".md", ".toml", ".txt", ".json", ".proto", ".sh", ""}:
            text = (ROOT / path).read_text(encoding="utf-8", errors="ignore")
            found += [f"{path}: {match.group()}" for match in pattern.finditer(text)]
    assert not found


def readme_tree() -> dict[str, str]:
    """Path -> gloss, from the indented tree of README.md: folders end in a slash, two spaces deeper a level."""
    block = read("README.md").split("```text tree\n")[1].split("```")[0]
    tree, folders = {}, []
    for line in block.splitlines():
        indent, name, gloss = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
        folders = folders[: len(indent) // 2]
        path = "/".join([*(folder.rstrip("/") for folder in folders), name])
        tree[path] = gloss
        if name.endswith("/"):
            folders.append(name)
    return tree


def test_readme_tree_is_the_tree() -> None:
    tree = readme_tree()
    listed = {path for path in tree if not path.endswith("/")}
    scripts = [path for path in FILES if path.startswith("scripts/")]
    missing = {*SOURCE_FILES, *scripts} - listed
    assert not missing, "README.md: the tree lacks these"
    gone = {path for path in tree if not (ROOT / path).exists()}
    assert not gone, "README.md: the tree names what is not there"
    assert not [path for path, gloss in tree.items() if not gloss], "README.md: each file and folder has a gloss"
