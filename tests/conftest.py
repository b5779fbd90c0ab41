"""The environment of a test run, set before JAX is imported, and the `--slow` leg.

Servers and workers that tests start as subprocesses inherit it. What it is not: helpers for tests (tests/support).
"""

import gc
import os
import sys
from importlib.metadata import version
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
NUM_DEVICES = 16  # DoP 8 x tp 2

XLA_FLAGS = (
    f"--xla_force_host_platform_device_count={NUM_DEVICES}",
    # Sixteen device threads on few cores: without more pool threads and patience, XLA ends a process whose slow rank
    # keeps a collective waiting.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    # Most of the suite's time is LLVM's. Without its optimizations programs compile five times as fast, and run fast
    # enough at the sizes of tests.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # The older emitters make less code: a step compiles in two thirds of the time. Newer XLA has no others to offer,
    # and ends the process at a flag it does not know.
    *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib") < "0.11" else []),
)

os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *XLA_FLAGS)).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", str(2 * NUM_DEVICES))
# The TPU compiler without a TPU: ask no metadata server, and let several processes load it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Tests start some hundred processes: where bytecode is not written, each of them would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("PYTHONPYCACHEPREFIX", str(ROOT / ".cache" / "pycache"))
sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]
# Reruns find their programs compiled. Tests about compiling point it elsewhere.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


@pytest.fixture(scope="module", autouse=True)
def _executables_released():
    """A process can map only so many executables, so those that one file's jitted functions made go with the file."""
    yield
    if "tests.support.plane" in sys.modules:
        sys.modules["tests.support.plane"].close_data_planes()
    if "jax" in sys.modules:
        gc.collect()
        sys.modules["jax"].clear_caches()
        gc.collect()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="redraw tests/golden/*.txt")
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    # Cores are shared, so no deadlines. The suite draws the same examples each time; the slow leg draws new ones.
    hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
    hypothesis.settings.register_profile("slow", deadline=None, print_blob=True)
    hypothesis.settings.load_profile("slow" if config.getoption("--slow") else "suite")


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()  # thousands of tests and all of JAX, which the collections after each file need not look at


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
