"""One CPU device, no network, deprecations of our own making are errors (see pyproject.toml)."""

import gc
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


def pytest_collection_modifyitems(items: list) -> None:
    """The shared table goes method by method, so that a method's compiled programs can be let go when its tests are over."""
    table = [i for i in items if i.path.name == "test_every_algorithm.py"]
    first = items.index(table[0]) if table else 0
    by_method = sorted(table, key=lambda i: str(getattr(i, "callspec", None) and i.callspec.params.get("name")))
    items[first : first + len(table)] = by_method


@pytest.fixture(autouse=True)
def few_compiled_programs():
    """Every compiled program holds memory maps, of which Linux gives a process 65 530; past them the compiler crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        import jax

        jax.clear_caches()
        gc.collect()


TOYS = {f"test_{name}.py" for name in """
    attention_maps closed_forms compare count drivers embedding every_algorithm every_method export full_evaluation guidance
    host_rewards noise_optimisation notebooks online_preference particles policy_gradient preference processes runs score_judge scorers
    sharding stable_diffusion steered_stable_diffusion""".split()}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """What toys compile runs a few times only: it is optimised least. Processes that a test starts inherit it."""
    import jax

    toys = request.path.name in TOYS
    with pytest.MonkeyPatch.context() as patch:
        if toys:
            patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", toys)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def no_process_is_left():
    """A test that fails leaves no process of `several` that trains on."""
    yield
    import several

    several.stop_all()


@pytest.fixture(scope="session")
def parity_python() -> str:
    """The interpreter that has torch, diffusers, transformers and open_clip, for the tests marked parity."""
    python = os.environ.get("ALIGNMENT_JAX_PARITY_PYTHON")
    if not python:
        pytest.skip("ALIGNMENT_JAX_PARITY_PYTHON names no interpreter with torch and diffusers")
    return python
