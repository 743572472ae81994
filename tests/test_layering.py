"""Imports point to the right only: train -> models -> nn -> ops -> dispatch -> backends -> leaves.

One backend never imports another, and only env.py reads the environment.
"""

import ast
import pathlib
from collections.abc import Iterator

import pytest

import fusedmm

ROOT = pathlib.Path(fusedmm.__file__).parent
LEAVES = {"problem", "check", "env", "tuning", "distributed"}
# What a layer may import beside itself; a layer not named here is above all of these.
MAY_IMPORT = {
    "nn": {"ops", "dispatch", *LEAVES, ""},
    "integrations": {"nn", "ops", "dispatch", *LEAVES, ""},
    "ops": {"dispatch", "backends", *LEAVES},
    "distributed": {"ops", "dispatch", "backends", *LEAVES},
    "dispatch": {"backends", *LEAVES},
    "backends": {"_C", "_C_cuda", *LEAVES},
    "tuning": LEAVES,
    "problem": {"check"},
    "check": set(),
    "env": set(),
    "models": {"nn", "ops", "dispatch", ""},
}
FILES = sorted(ROOT.rglob("*.py"))
LAYERED = [p for p in FILES if p.relative_to(ROOT).with_suffix("").parts[0] in MAY_IMPORT]
BACKENDS = [p for p in FILES if p.parent.parent == ROOT / "backends"]


def _imports(path: pathlib.Path) -> Iterator[str]:
    """Dotted names below fusedmm that a file imports, "" for the package itself."""
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "fusedmm":
                    yield alias.name.removeprefix("fusedmm").lstrip(".")
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                base = list(here[: len(here) - node.level])
            elif module[:1] == ["fusedmm"]:
                base, module = [], module[1:]
            else:
                continue
            for alias in node.names:
                yield ".".join([*base, *module, alias.name])


def _layer(dotted: str) -> str:
    first = dotted.split(".")[0]
    known = {*MAY_IMPORT, "_C", "_C_cuda", "models", "train", "testing", "_build_info"}
    return first if first in known else ""


@pytest.mark.parametrize("path", LAYERED, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_right(path: pathlib.Path) -> None:
    layer = path.relative_to(ROOT).with_suffix("").parts[0]
    for dotted in _imports(path):
        assert _layer(dotted) in {layer, "_build_info", *MAY_IMPORT[layer]}, (
            f"{layer} imports {dotted}"
        )


@pytest.mark.parametrize("path", BACKENDS, ids=lambda p: str(p.relative_to(ROOT)))
def test_backends_do_not_import_each_other(path: pathlib.Path) -> None:
    others = {p.name for p in (ROOT / "backends").iterdir() if p.is_dir()} - {path.parent.name}
    for dotted in _imports(path):
        names = dotted.split(".")
        assert not (names[0] == "backends" and len(names) > 1 and names[1] in others), dotted


def test_only_env_reads_the_environment() -> None:
    library = {"ops", "dispatch", "backends", "nn", "check", "problem", "tuning", "integrations"}
    for path in FILES:
        if path.relative_to(ROOT).with_suffix("").parts[0] in library:
            for node in ast.walk(ast.parse(path.read_text())):
                name = node.attr if isinstance(node, ast.Attribute) else ""
                assert name not in ("environ", "getenv"), f"{path.name} reads the environment"


def test_the_rule_can_fail(tmp_path: pathlib.Path) -> None:
    assert list(_imports(ROOT / "dispatch.py")), "the parser of imports finds nothing"
    assert "backends" in {_layer(d) for d in _imports(ROOT / "dispatch.py")}
