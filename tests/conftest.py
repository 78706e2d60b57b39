"""Settings that remove whole classes of mistakes; they hold for every test."""

import os
import tempfile

os.environ.setdefault("MUJOCO_GL", "disable")
os.environ["EVOR_DATA_HOSTS"] = ""  # no test downloads anything from the real hosts
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # (B,) against (B, 1) is an error, in worker processes too
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # pytest's own process: its workers, and what they start, share it
    _cache = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

from jaxtyping import install_import_hook

# Checks every shape annotation of the project while tests run.
install_import_hook(["common", "evor_bc", "evor_value", "evor_infer", "benchmarks", "baselines"], "beartype.beartype")

import gc  # noqa: E402
import signal  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 1)  # whichever test comes first

# A shell starts what goes to the background with Ctrl-C ignored, and so would all processes of the tests be.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs() -> Iterator[None]:
    """Each compiled program is mapped into memory, and a process may have 65,530 maps: beyond that XLA crashes."""
    yield
    jax.clear_caches()
    gc.collect()


LONGEST = ("test_training", "test_kill", "test_value", "test_infer", "test_data", "test_qc", "test_baselines")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no process is left with one at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)
