"""Against code that nobody here wrote: the two forms of Qwen3-Next in Hugging Face `transformers`."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_operands import assert_near

from kernels_pallas import gated_delta_rule_from_gates, gated_delta_step

FIXTURES = sorted(pathlib.Path(__file__).with_name("fixtures").glob("qwen3_next_*.npz"))
OPERANDS = ("q", "k", "v", "a", "b", "A_log", "dt_bias", "initial_state")


def test_fixtures_are_there():
    assert len(FIXTURES) == 2


@functools.cache
def ours(path, implementation):
    """Forward and gradients in float32 on the fixture's operands and cotangents."""
    data = np.load(path)
    eps = 1e-6 if data["normalise"] else None

    @jax.jit
    def run(x, weights):
        def op(x):
            return gated_delta_rule_from_gates(
                **x, qk_norm_eps=eps, return_final_state=True, implementation=implementation
            )

        (o, final_state), vjp = jax.vjp(op, x)
        gradients = vjp(weights)[0]
        return {"o": o, "final_state": final_state} | {f"d{name}": g for name, g in gradients.items()}

    x = {name: jnp.asarray(data[name]) for name in OPERANDS}
    return run(x, (jnp.asarray(data["do"]), jnp.asarray(data["dfinal_state"])))


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_equals_transformers(path, implementation, form):
    data = np.load(path)
    for name, value in ours(path, implementation).items():
        assert_near(name, value, data[f"{form}.{name}"], "float32")


def test_step_equals_transformers():
    (path,) = [path for path in FIXTURES if path.stem.endswith("grouped_norm")]
    data = np.load(path)
    log_decay = -np.exp(data["A_log"]) * np.logaddexp(0, data["a"] + data["dt_bias"])
    beta = 1 / (1 + np.exp(-data["b"]))
    step = jax.jit(functools.partial(gated_delta_step, qk_norm_eps=1e-6))
    state, steps = jnp.asarray(data["initial_state"]), []
    for t in range(data["q"].shape[1]):
        o, state = step(
            *(jnp.asarray(x[:, t]) for x in (data["q"], data["k"], data["v"], log_decay, beta)), state
        )
        steps.append(o)
    assert_near("o", jnp.stack(steps, axis=1), data["recurrent.o"])
    assert_near("final_state", state, data["recurrent.final_state"])
