"""What is imported is declared and pinned, and a wheel of the repository works away from it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from conftest import MANIFEST, TINY_LLAMA

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ELSEWHERE = {  # run in an environment of their own, which their own words describe
    "builder/inside_vllm": {"vllm"},
    "tests/golden/list_vllm_options.py": {"vllm"},
    "tests/golden/make_llm_compressor.py": {"datasets", "llmcompressor"},
    "tests/benchmarks/peers.py": {"llmcompressor"},
    "tests/benchmarks/plot.py": {"matplotlib"},
}


def normalize(name: str) -> str:
    """A distribution's name as registries compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_names(requirements: list[str]) -> set[str]:
    names = {normalize(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}
    return names - {"release-builder"}


RUNNING = read_names(PROJECT["dependencies"])
EXTRAS = {extra: read_names(listed) for extra, listed in PROJECT["optional-dependencies"].items()}
DEVELOPING = RUNNING.union(*EXTRAS.values())


def list_imports(path: Path) -> Iterator[str]:
    """First parts of the foreign modules that a file imports anywhere."""
    own = {"builder", *(other.stem for other in (ROOT / "tests").rglob("*.py"))}
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        else:
            continue
        yield from {module.split(".")[0] for module in modules} - own - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("folder", "declared"), [("builder", RUNNING | EXTRAS["signing"]), ("tests", DEVELOPING)], ids=["builder", "tests"]
)
def test_every_import_is_a_declared_dependency(folder: str, declared: set[str]) -> None:
    distributions = packages_distributions()
    for path in sorted((ROOT / folder).rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        aside = set().union(*(modules for start, modules in ELSEWHERE.items() if place.startswith(start)))
        for module in sorted(set(list_imports(path)) - aside):
            names = {normalize(name) for name in distributions.get(module, [module])}
            assert names & declared, f"{place} imports {module}, and pyproject.toml does not ask for it"


def test_what_signs_is_imported_where_it_may_be_missing_and_nowhere_else() -> None:
    users = {path.name for path in (ROOT / "builder").rglob("*.py") if "cryptography" in set(list_imports(path))}
    assert users == {"signing.py"}


def test_every_dependency_is_pinned_to_what_is_installed() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert {normalize(name) for name in pins} >= DEVELOPING
    for name, pinned in pins.items():
        assert version(name).partition("+")[0] == pinned, name


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a release in it and a wheel of the repository installed beside it, as a user of the wheel has."""
    folder = tmp_path_factory.mktemp("away")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("release_builder-*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "site")]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    shutil.copytree(TINY_LLAMA / "base", folder / "releases" / "base")
    for name in ("calibration.jsonl", "heldout.txt"):
        shutil.copy(TINY_LLAMA / name, folder / "releases")
    (folder / "releases" / "tiny.yaml").write_text(MANIFEST, "utf-8")
    (folder / "pyproject.toml").write_text(read_advice(), "utf-8")
    return folder


def read_advice() -> str:
    """The pyproject.toml that the README tells users of a wheel to write."""
    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    return str(block)


def run_away(away: Path, *command: str) -> str:
    """What a Python program says that has the wheel before this checkout on its path."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=away,
        env=os.environ | {"PYTHONPATH": str(away / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_holds_all_that_is_read_by_path(away: Path) -> None:
    site = away / "site" / "builder"
    for folder in ("data", "license_texts", "inside_vllm"):
        assert list_files(site / folder) == list_files(ROOT / "builder" / folder), folder
    assert list_files(site / "templates") == list_files(ROOT / "templates")
    told = run_away(away, "-c", "from builder import render; print(render.TEMPLATES)")
    assert told.strip() == str(site / "templates")


def list_files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_wheel_lists_and_previews_a_release_in_a_folder_of_the_users_own(away: Path) -> None:
    listed = run_away(away, "-m", "doit", "list", "--all").splitlines()
    assert [line.split()[0] for line in listed if ":tiny" in line][:3] == ["release:tiny", "plan:tiny", "fetch:tiny"]
    run_away(away, "-m", "doit", "preview:tiny")
    card = (away / "build" / "tiny" / "preview" / "README.md").read_text("utf-8")
    assert "# Tiny Llama — NVFP4" in card and "not built yet" in card
