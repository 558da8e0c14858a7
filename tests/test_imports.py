"""The rooms import downwards only, and importing the package is quick and light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import alignment_jax

ROOT = Path(alignment_jax.__file__).parent
LAYERS = {
    "diffusion": set(), "algorithms": {"diffusion"}, "test_time": {"diffusion"}, "models": {"diffusion"},
    "weights": set(), "data": {"models", "diffusion"}, "rewards": {"data", "models", "weights", "diffusion"},
    "evaluation": {"diffusion"},
    "training": {"algorithms", "test_time", "rewards", "evaluation", "data", "weights", "models", "diffusion"},
}  # fmt: skip
BELOW = {"platform"}  # what every room may ask: one file that imports none of them
PURE = {"diffusion", "algorithms", "test_time"}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path):
    """(absolute module names, rooms of this package) that a file imports anywhere, inside functions too."""
    outside, rooms = set(), set()
    parts = path.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            outside |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            depth = len(parts) - node.level  # folders that remain
            base = list(parts[:depth]) + ([*node.module.split(".")] if node.module else [])
            names = [[*base, a.name] for a in node.names] if not base else [base]
            rooms |= {n[0] for n in names}
    return outside, rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_downwards_only(path):
    room = path.relative_to(ROOT).parts[0]
    outside, rooms = imports(path)
    assert not outside & {"torch", "tensorflow", "clu", "chex"}
    assert "alignment_jax" not in outside, "inside the package imports are relative"
    assert room.removesuffix(".py") not in BELOW or not rooms
    if room in LAYERS:
        above = rooms - {room} - BELOW - LAYERS[room]
        assert not above, f"{room} must not import {above}"
    if room in PURE:
        allowed = {"__future__", "collections", "typing", "dataclasses", "jax", "numpy", "optax", "math", "functools"}
        assert outside <= allowed, f"a pure room imports {outside - allowed}"


@pytest.mark.floor
def test_importing_the_package_is_light():
    code = "import sys, alignment_jax; print(sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & {"torch", "tensorflow", "tensorflow_datasets", "matplotlib", "transformers", "jax", "orbax"}


@pytest.mark.floor
def test_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert version("alignment_jax") == alignment_jax.__version__
