"""The caps of style.md and the import directions of design.md, read from the source."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("async_rlhf", "actors", "learners")

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_PUBLIC_METHODS = 7
MAX_CONSTRUCTOR_ARGUMENTS = 5

ALLOWED: dict[str, str] = {}
"""Exceptions from the caps: `path` or `path::name` -> reason. Keep it short."""

TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Makefile",
    *PACKAGES,
    "conf",
    "deploy",
    "docs",
    "benchmarks",
    "tests",
    ".ci",
    # Files that git, pre-commit and the lock need at the root.
    ".gitignore",
    ".pre-commit-config.yaml",
    "uv.lock",
}

BANNED_NAME_PARTS = ("Manager", "Helper", "Utils", "Handler")
ENGINES = {"ray", "vllm", "deepspeed"}

FILES = sorted(file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
TREES = {file: ast.parse((ROOT / file).read_text(encoding="utf-8")) for file in FILES}
Function = ast.FunctionDef | ast.AsyncFunctionDef

each_file = pytest.mark.parametrize("file", FILES, ids=str)


def imported(node: ast.AST) -> Iterator[str]:
    """Top-level packages that an import statement names."""
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        yield (node.module or "").partition(".")[0]


def imports_anywhere(file: Path) -> set[str]:
    return {name for node in ast.walk(TREES[file]) for name in imported(node)}


def imports_outside_functions(node: ast.AST) -> set[str]:
    if isinstance(node, Function) or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        return set()
    return set(imported(node)).union(*(imports_outside_functions(child) for child in ast.iter_child_nodes(node)))


def is_command(file: Path) -> bool:
    """The command line, which may start actors inside its functions."""
    return file.parts[:2] == ("async_rlhf", "commands") or (len(file.parts) == 2 and file.name.startswith(("cli", "__main__")))


def classes(file: Path) -> list[ast.ClassDef]:
    return [node for node in ast.walk(TREES[file]) if isinstance(node, ast.ClassDef)]


def decorators(node: Function | ast.ClassDef) -> list[str]:
    return [ast.unparse(decorator) for decorator in node.decorator_list]


def breaches(cap: int, sizes: dict[str, int]) -> list[str]:
    return [f"{name}: {size} > {cap}" for name, size in sizes.items() if size > cap and name not in ALLOWED]


# Import directions


@each_file
def test_core_names_no_engine_but_inside_the_functions_of_a_command(file: Path) -> None:
    if file.parts[0] != "async_rlhf":
        return
    seen = imports_outside_functions(TREES[file]) if is_command(file) else imports_anywhere(file)
    assert seen & ENGINES == set()


@each_file
def test_imports_between_the_packages_go_one_way(file: Path) -> None:
    package = file.parts[0]
    forbidden = {"actors": {"learners"}, "learners": {"actors"}, "async_rlhf": {"actors", "learners"}}[package]
    seen = imports_outside_functions(TREES[file]) if is_command(file) else imports_anywhere(file)
    assert seen & forbidden == set()


@each_file
def test_only_launch_turns_classes_into_ray_actors(file: Path) -> None:
    if file == Path("actors/launch.py"):
        return
    named = [node for node in ast.walk(TREES[file]) if isinstance(node, ast.Attribute) and ast.unparse(node) == "ray.remote"]
    taken = [node for node in ast.walk(TREES[file]) if isinstance(node, ast.ImportFrom) and node.module == "ray"]
    assert named == []
    assert not any(alias.name == "remote" for node in taken for alias in node.names)


def test_core_imports_quickly_without_torch_or_any_engine() -> None:
    code = (
        "import sys, async_rlhf.config, async_rlhf.replay, async_rlhf.prompts, async_rlhf.tasks\n"
        "print(*sorted({'torch', 'ray', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == []


def test_the_driver_of_a_run_starts_without_torch_or_any_engine() -> None:
    """They take seconds, before the first actor starts."""
    code = (
        "import sys, actors.run, learners.group, learners.rank, learners.sending\n"
        "print(*sorted({'torch', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == []


def test_nothing_that_a_driver_imports_before_it_opens_its_session_imports_ray() -> None:
    """Ray reads its authentication settings when it is imported: the token of the run's own Ray must be there by then."""
    before = "async_rlhf.commands.drive, async_rlhf.commands.train, async_rlhf.commands.resume, actors.accounts, actors.session"
    code = f"import sys, {before}\nprint('ray' in sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False"]


# Caps


def test_files_are_short() -> None:
    sizes = {str(file): len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert breaches(MAX_FILE_LINES, sizes) == []


def test_functions_are_short() -> None:
    sizes = {
        f"{file}::{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for file in FILES
        for node in ast.walk(TREES[file])
        if isinstance(node, Function)
    }
    assert breaches(MAX_FUNCTION_LINES, sizes) == []


def test_classes_have_few_public_methods() -> None:
    def count(node: ast.ClassDef) -> int:
        methods = [item for item in node.body if isinstance(item, Function) and not item.name.startswith("_")]
        return len({item.name for item in methods if not any("property" in name or ".setter" in name for name in decorators(item))})

    assert breaches(MAX_PUBLIC_METHODS, {f"{file}::{node.name}": count(node) for file in FILES for node in classes(file)}) == []


def test_constructors_take_few_arguments() -> None:
    def count(node: ast.ClassDef) -> int:
        makers = [item.args for item in node.body if isinstance(item, Function) and item.name == "__init__"]
        named = sum(len(args.posonlyargs + args.args + args.kwonlyargs) - 1 for args in makers)
        return named + sum(extra is not None for args in makers for extra in (args.vararg, args.kwarg))

    sizes = {
        f"{file}::{node.name}": count(node)
        for file in FILES
        for node in classes(file)
        if not any("dataclass" in name for name in decorators(node))
    }
    assert breaches(MAX_CONSTRUCTOR_ARGUMENTS, sizes) == []


def test_class_names_say_what_a_thing_is() -> None:
    names = [node.name for file in FILES for node in classes(file)]
    assert [name for name in names if any(part in name for part in BANNED_NAME_PARTS)] == []


def test_each_exception_from_the_caps_names_something_that_exists_and_has_a_reason() -> None:
    for entry, reason in ALLOWED.items():
        path, _, name = entry.partition("::")
        assert reason
        assert Path(path) in TREES
        assert not name or any(getattr(node, "name", None) == name for node in ast.walk(TREES[Path(path)]))


# The repository


def repository_files() -> list[Path]:
    """What git tracks, and what it would take in with `git add .`."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, or no git")
    listing = [git, "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    out = subprocess.run(listing, check=True, cwd=ROOT, capture_output=True, timeout=60).stdout.decode()
    return [Path(name) for name in out.split("\0") if name]


def test_top_level_of_the_repository_holds_nothing_unexpected() -> None:
    assert {file.parts[0] for file in repository_files()} - TOP_LEVEL == set()


def test_python_files_are_ascii() -> None:
    files = [file for file in repository_files() if file.suffix == ".py" and (ROOT / file).is_file()]
    assert [str(file) for file in files if not (ROOT / file).read_bytes().isascii()] == []


def test_no_file_at_the_root_shadows_a_module() -> None:
    modules = {Path(file.parts[0]).stem for file in repository_files() if len(file.parts) == 1 or file.suffix == ".py"}
    assert modules & (sys.stdlib_module_names | {"ray", "vllm", "deepspeed", "torch", "transformers"}) == set()


def test_known_mistake_13_no_engine_or_scorer_knows_whether_training_is_synchronous() -> None:
    """max_staleness 0 is the same code on the same engine: who samples, scores or trains cannot tell the difference."""
    knowing = {file.as_posix() for file in FILES if "max_staleness" in (ROOT / file).read_text(encoding="utf-8")}

    assert not {name for name in knowing if name.startswith(("learners/", "actors/engine", "actors/generator", "actors/scorer"))}
    assert knowing & {"async_rlhf/staleness.py"}, "the search finds nothing any more"
