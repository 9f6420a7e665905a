"""The public names, `docs/api.md`."""

import ast
import re
from importlib import import_module
from pathlib import Path

import trl_epo


ROOT = Path(__file__).parents[1]


def public_names():
    rows = re.findall(r"^\| `([a-z_.]+)`[^|]*\| (.*) \|$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    return {(module, name) for module, names in rows for name in re.findall(r"`(\w+)`", names)}


def test_public_names_are_there():
    assert {name for module, name in public_names() if module == "trl_epo"} == set(trl_epo.__all__)
    for module, name in public_names():
        assert hasattr(import_module(module), name), f"{module}.{name}"


def test_examples_import_public_names_only():
    public = public_names()
    modules = {module for module, _ in public}
    for path in (ROOT / "examples").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl_epo"):
                for alias in node.names:
                    is_module = f"{node.module}.{alias.name}" in modules
                    assert is_module or (node.module, alias.name) in public, f"{path}: {node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                assert all(not a.name.startswith("trl_epo") or a.name in modules for a in node.names), path
