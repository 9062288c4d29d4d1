"""The single step's TPU kernel, interpreted, with races and memory checked: values, gradients, composition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from kernel_operands import assert_near, cast, cotangents, operands

from kernels_pallas import gated_delta_step
from kernels_pallas.gated_delta_rule import tiling

STRICT = pltpu.InterpretParams(
    detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


@pytest.fixture(autouse=True)
def no_races(capfd):
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out


def token(shape, dtype="float32", seed=0):
    """Operands of one token: (B, H, G, K, V)."""
    batch, *rest = shape
    x = cast(operands(batch, 1, *rest, seed=seed), "float32")
    x = {name: y if name == "initial_state" else y[:, 0] for name, y in x.items()}
    x["state"] = x.pop("initial_state")
    return x | {name: x[name].astype(dtype) for name in "qkv"}


def outputs_and_gradients(op, x, **options):
    (o, state), vjp = jax.vjp(lambda x: op(**x, **options), x)
    (gradients,) = vjp(cotangents((o, state)))
    return {"o": o, "state": state} | {f"d{name}": y for name, y in gradients.items()}


def interpreted(op, x, **options):
    with pltpu.force_tpu_interpret_mode(STRICT):
        run = jax.jit(functools.partial(outputs_and_gradients, op))
        return jax.tree.map(np.asarray, run(x, **options))


def defined(x, **options):
    with jax.enable_x64(True):
        op = functools.partial(gated_delta_step, implementation="reference")
        return jax.jit(functools.partial(outputs_and_gradients, op))(cast(x, "float64"), **options)


KERNEL = functools.partial(gated_delta_step, implementation="mosaic_tpu")
# name: ((B, H, G, K, V), dtype, bytes of a program's states)
CASES = {
    "grouped": ((2, 2, 4, 60, 20), "float32", 2**21),
    "bfloat16": ((2, 4, 4, 64, 128), "bfloat16", 2**21),
    "two_key_heads_a_program": ((1, 4, 8, 16, 24), "float32", 4 * 4 * 16 * 24),
    "part_of_a_key_head_a_program": ((1, 2, 8, 16, 24), "float32", 2 * 4 * 16 * 24),
    "wide_values": ((1, 1, 2, 8, 300), "float32", 2**21),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_definition(case, monkeypatch):
    shape, dtype, state_bytes = CASES[case]
    monkeypatch.setattr(tiling, "TPU_STEP_BYTES", state_bytes)
    x = token(shape, dtype)
    actual, wanted = interpreted(KERNEL, x), defined(x)
    assert actual["o"].dtype == dtype
    assert actual["state"].dtype == "float32"
    for name, value in actual.items():
        assert_near(name, value, wanted[name], dtype)


def test_norm_scale_and_rows_that_are_not_active():
    x = token((3, 1, 2, 16, 24))
    active = jnp.asarray([True, False, True])
    poisoned = {name: y if name == "state" else y.at[1].set(jnp.nan) for name, y in x.items()}
    options = {"qk_norm_eps": 1e-6, "scale": 0.7}
    actual = interpreted(functools.partial(KERNEL, **options), poisoned, active=active)
    reference = functools.partial(gated_delta_step, implementation="reference", **options)
    with jax.enable_x64(True):
        wanted = outputs_and_gradients(reference, cast(x, "float64"), active=active)
    for name, value in actual.items():
        assert_near(name, value, wanted[name])
    assert not actual["o"][1].any()
    np.testing.assert_array_equal(actual["state"][1], x["state"][1])


def test_vmap_equals_loop():
    rows = [token((2, 1, 2, 16, 24), seed=seed) for seed in (3, 4)]
    stacked = jax.tree.map(lambda *y: jnp.stack(y), *rows)
    together = interpreted(lambda **x: jax.vmap(lambda y: KERNEL(**y))(x), stacked)
    for index, row in enumerate(rows):
        alone = interpreted(KERNEL, row)
        for name in ("o", "state"):
            np.testing.assert_array_equal(together[name][index], alone[name])


def test_refuses_by_name():
    with pytest.raises(NotImplementedError, match="runs on TPUs; this is a cpu"):
        KERNEL(**token((1, 1, 1, 8, 8)))
    with pltpu.force_tpu_interpret_mode(STRICT):
        with pytest.raises(NotImplementedError, match="state must be at most 2097152 bytes; got 2129920"):
            KERNEL(**token((1, 1, 1, 256, 2080)))
