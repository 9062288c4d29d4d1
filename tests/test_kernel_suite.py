"""One suite for every implementation of the gated delta rule: against the definition in float64, and by its laws.

A new implementation joins by a line in `IMPLEMENTATIONS`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_operands import assert_near, cast, cotangents, forward_and_gradients, operands

from kernels_pallas import gated_delta_rule, gated_delta_rule_from_gates, gated_delta_step

IMPLEMENTATIONS = ("chunked",)
# The laws hold for the definition as well: a wrong definition is found here and by the fixtures.
LAWFUL = ("reference", *IMPLEMENTATIONS)

# name: (B, T, H, G, K, V) and what is hard about it.
CASES = {
    "one_token": ((2, 1, 1, 2, 12, 20), {}),
    "almost_a_chunk": ((2, 63, 1, 2, 12, 20), {}),
    "a_chunk": ((2, 64, 1, 2, 12, 20), {}),
    "a_chunk_and_one": ((2, 65, 1, 2, 12, 20), {}),
    "long_correlated": ((1, 500, 2, 4, 60, 16), {"keys": "correlated"}),
    "long_extreme_decay": ((1, 500, 2, 4, 60, 16), {"decay": "extreme"}),
    "long_correlated_extreme": ((1, 500, 2, 4, 60, 16), {"keys": "correlated", "decay": "extreme"}),
}
DTYPES = ("float64", "float32", "bfloat16")


@functools.cache
def compiled(implementation, op=gated_delta_rule):
    """Forward and gradients, compiled once per shape and dtype for all the tests below."""
    return jax.jit(functools.partial(forward_and_gradients, op, implementation=implementation))


def with_documents(x, segment_ids):
    """`forward_and_gradients` takes operands that it differentiates: the ids are bound here."""
    return functools.partial(gated_delta_rule, segment_ids=jnp.asarray(segment_ids, jnp.int32)), x


@functools.cache
def expected(case, dtype):
    """The definition in float64, on inputs and cotangents already rounded to `dtype`."""
    shape, hard = CASES[case]
    with jax.enable_x64(True):
        rounded = cast(operands(*shape, **hard), dtype)
        rounded["initial_state"] = rounded["initial_state"].astype("float32" if dtype == "bfloat16" else dtype)
        return rounded, compiled("reference")(cast(rounded, "float64"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_definition(implementation, case, dtype):
    x, wanted = expected(case, dtype)
    with jax.enable_x64(dtype == "float64"):
        actual = compiled(implementation)(x)
    assert actual["o"].dtype == dtype
    assert actual["final_state"].dtype == ("float64" if dtype == "float64" else "float32")
    for name, value in actual.items():
        assert_near(name, value, wanted[name], dtype)
