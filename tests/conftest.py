"""One CPU device, no network, deprecations of our own making are errors (see pyproject.toml)."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# tests compile the same small programs again and again: all of them are kept where the environment names a cache
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def parity_python() -> str:
    """The interpreter that has torch, diffusers, transformers and open_clip, for the tests marked parity."""
    python = os.environ.get("ALIGNMENT_JAX_PARITY_PYTHON")
    if not python:
        pytest.skip("ALIGNMENT_JAX_PARITY_PYTHON names no interpreter with torch and diffusers")
    return python
