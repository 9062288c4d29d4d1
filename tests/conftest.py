"""The strict session: two cores, warnings are errors (pyproject), rank promotion raises, annotations checked."""

import fcntl
import json
import os
import pathlib

# Before jax is imported: tests never want an accelerator, and a compilation cache makes a second run quick.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# Threads of XLA's pool. Interpreted kernels for GPUs wait for one another in it: with two of them they wait forever.
os.environ.setdefault("NPROC", "8")

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure():
    """Compiling is most of what tests do. Only in this process: commands that they start optimize as a user's do."""
    jax.config.update("jax_disable_most_optimizations", True)


def once(tmp_path_factory, name, measure):
    """What ``measure()`` gives, something of JSON: in the first test process that asks, the others read it.

    Tests of one module may be split between processes, and each would measure for itself.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / f"{name}.json"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_text(json.dumps(measure()))
    return json.loads(path.read_text())


@pytest.fixture
def optimized():
    """Programs as a user has them, for a test of how they round: optimized sums have less of it."""
    # Those that other tests compiled would be taken.
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def unchecked_annotations():
    """The annotations, which only tests check, would refuse first: users meet the errors of ours."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def libtpu():
    """The TPU compiler, or a skip; a failure where it must be there, as in `make test` on Linux."""
    from kernels_pallas.gated_delta_rule import tpu_compiler

    if tpu_compiler.find_libtpu() is None:
        reason = "there is no TPU compiler; `make tpu-compiler` installs it"
        if os.environ.get("GDN_REQUIRE_TPU_COMPILER"):
            pytest.fail(reason)
        pytest.skip(reason)
