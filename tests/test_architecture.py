"""The table of modules: imports point downward, and heavy libraries stay where they are allowed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "builder"

IN_ORDER = (
    "errors",
    "files",
    "digests",
    "machine",
    "machine_class",
    "progress",
    "manifest",
    "licenses",
    "hub",
    "pins",
    "base",
    "kernels",
    "gpu",
    "arithmetic",
    "families",
    "schemes",
    "plan",
    "calibration",
    "streaming",
    "parts",
    "artifact",
    "export_template",
    "worker",
    "executors",
    "fixes",
    "readback",
    "verify",
    "perplexity",
    "options",
    "serving",
    "services",
    "sizing",
    "records",
    "evaluation",
    "benchmarks",
    "inside_vllm",
    "engine",
    "endpoint",
    "server",
    "answers",
    "lock",
    "rebuild",
    "recorded",
    "provenance",
    "differences",
    "published",
    "comparison",
    "render",
    "signing",
    "stages",
    "terminal",
    "graph",
)
ALONE = {
    "modelopt": "schemes",
    "ray": "executors",
    "doit": "graph",
    "model_signing": "signing",
    "vllm": "inside_vllm",
}
LIGHT = (
    "errors",
    "files",
    "digests",
    "machine",
    "machine_class",
    "progress",
    "manifest",
    "licenses",
    "hub",
    "pins",
    "base",
    "plan",
    "options",
    "serving",
    "services",
    "sizing",
    "records",
    "evaluation",
    "benchmarks",
    "engine",
    "endpoint",
    "server",
    "answers",
    "lock",
    "rebuild",
    "recorded",
    "provenance",
    "differences",
    "published",
    "comparison",
    "render",
    "signing",
    "stages",
    "graph",
)
HEAVY = {
    "compressed_tensors",
    "huggingface_hub",
    "model_signing",
    "modelopt",
    "numba",
    "pyarrow",
    "ray",
    "torch",
    "transformers",
}

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported anywhere in a file, imports for type checking aside."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


def at_import_time(tree: ast.Module) -> Iterator[str]:
    """First parts of what is imported as soon as the module is."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_every_module_is_in_the_table() -> None:
    assert {module_of(path) for path in FILES} - {"__init__"} == set(IN_ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_to_rows_above(path: Path) -> None:
    module = module_of(path)
    for name in imports(ast.parse(path.read_text("utf-8"))):
        if not name.startswith("builder."):
            continue
        imported = name.split(".")[1]
        if module == "__init__" or imported == module:
            continue
        assert IN_ORDER.index(imported) < IN_ORDER.index(module), f"{module} imports {imported}, which stands below it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_large_libraries_are_imported_in_one_place_each(path: Path) -> None:
    for name in imports(ast.parse(path.read_text("utf-8"))):
        library = name.split(".")[0]
        assert ALONE.get(library) in (None, module_of(path)), f"{library} is imported outside {ALONE[library]}"


@pytest.mark.parametrize("path", [path for path in FILES if module_of(path) in LIGHT], ids=lambda path: path.stem)
def test_what_every_command_loads_is_light(path: Path) -> None:
    assert not HEAVY & set(at_import_time(ast.parse(path.read_text("utf-8"))))
