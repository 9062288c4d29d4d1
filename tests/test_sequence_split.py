"""A sequence split over devices equals a sequence on one: the op, the mixer, their gradients and their traffic.

Eight emulated devices need a process of their own (the flag is read when JAX starts). One runs every case of
`sequence_cases.py` and prints what it measured; the tests judge the numbers.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import once
from flax import nnx
from kernel_operands import GATE_TOLERANCE, GATES, TOLERANCE, cast, operands
from sequence_cases import (
    AXIS,
    FAULTS,
    FORWARD_CASES,
    MIXER_CASES,
    OP_CASES,
    SHAPE,
    make_mixer,
)

from kernels_pallas import gated_delta_rule

ROOT = pathlib.Path(__file__).parents[1]

_CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest
from jaxtyping import install_import_hook
install_import_hook(["kernels_pallas", "gdn_jax"], "beartype.beartype")
import sequence_cases
sequence_cases.print_results()
"""


def measure():
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(ROOT / "tests")],
        # The programs are tiny, and compiling them takes most of the time.
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return once(tmp_path_factory, "sequence_split", measure)


def beyond(errors, dtype):
    """The entries whose error is beyond their tolerance; prints them all."""
    assert isinstance(errors, dict), errors
    found = {}
    for name, error in errors.items():
        tolerance = 0 if name == "padding" else (GATE_TOLERANCE if name in GATES else TOLERANCE)[dtype]
        print(f"{name}: {error:.1e} of {tolerance:.0e}")
        # Also where it is NaN.
        if not error <= tolerance:
            found[name] = error
    return found


@pytest.mark.parametrize("name", OP_CASES)
@pytest.mark.slow
def test_op_equals_one_device(measured, name):
    dtype, _ = OP_CASES[name]
    assert {"o", "final_state", "dq", "dk", "dv", "dinitial_state"} <= measured[name].keys()
    assert not beyond(measured[name], dtype)


@pytest.mark.parametrize("name", MIXER_CASES)
@pytest.mark.slow
def test_mixer_equals_one_device(measured, name):
    assert {"y", "dA_log", "dconv_q.kernel", "dq.kernel", "do.kernel"} <= measured[name].keys()
    assert not beyond(measured[name], "float32")


@pytest.mark.parametrize("name", FORWARD_CASES)
@pytest.mark.slow
def test_forward_equals_one_device(measured, name):
    assert not beyond(measured[name], "float32")


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.slow
def test_faults_are_found(measured, name):
    found = beyond(measured[name], "float32")
    assert max(found.values()) > 0.01


@pytest.mark.slow
def test_only_states_ids_and_halos_travel(measured):
    assert isinstance(measured["traffic"], dict), measured["traffic"]
    batch, _, key_heads, value_heads, key_dim, value_dim = SHAPE
    state = batch * value_heads * key_dim * value_dim
    with_transition = batch * value_heads * key_dim * (value_dim + key_dim)
    halos = {batch * 3 * n for n in (1, key_heads * key_dim, value_heads * value_dim)}

    def moved(found, operation):
        return [(dtype, elements) for name, dtype, elements in found if name == operation]

    for name, permuted in (("op", {state, with_transition}), ("mixer", {state, with_transition} | halos)):
        short, long = measured["traffic"][name]
        # Nothing grows with the length of the sequence.
        assert short == long
        assert {operation for operation, _, _ in short} == {"all-gather", "all-reduce", "collective-permute"}
        # One id of each row from each of four devices.
        assert moved(short, "all-gather") == [("s32", 4 * batch)]
        assert {elements for _, elements in moved(short, "collective-permute")} == permuted
    # Nor do the kernels exchange anything else.
    assert measured["traffic"]["kernels"] == measured["traffic"]["op"][:1]
    # The final state, and the gradient of the initial one.
    op, _ = measured["traffic"]["op"]
    assert moved(op, "all-reduce") == [("f32", state)] * 2
    (gathering,) = measured["traffic"]["gathering"]
    assert ("f32", batch * 64 * key_heads * key_dim) in moved(gathering, "all-gather")


def small():
    return cast(operands(1, 8, 1, 1, 4, 4), "float32")


def trace_mixer(x):
    graph, parameters = nnx.split(nnx.eval_shape(make_mixer))
    return jax.eval_shape(lambda p: nnx.merge(graph, p)(x, sequence_axis=AXIS), parameters)


class TestRefusals:
    def test_axis_that_is_not_manual(self):
        with pytest.raises(ValueError, match=r"got 'sequence', which is not. Call it inside jax.shard_map"):
            gated_delta_rule(**small(), sequence_axis=AXIS)
        with pytest.raises(ValueError, match="sequence_axis must be a mesh axis that is manual"):
            gated_delta_rule(**small(), segment_ids=jnp.ones((1, 8), int), sequence_axis=AXIS)
        with pytest.raises(ValueError, match="manual where the mixer is called; got 'sequence'"):
            trace_mixer(jnp.zeros((4, 8, 16)))

    def test_parts_shorter_than_the_halo(self):
        # vmap's axis stands in for the mesh's.
        with pytest.raises(ValueError, match="at least conv_size - 1 = 3 positions; got 2"):
            jax.vmap(trace_mixer, axis_name=AXIS)(jnp.zeros((8, 4, 2, 16)))
