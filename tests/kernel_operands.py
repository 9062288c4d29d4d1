"""Operands and comparison that the kernel tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# RMS(error) / RMS(expected), by the dtype of the inputs. Acceptance of float64 and float32 as the issue sets it;
# bfloat16 is held to the 0.25-1 % that published kernels reach against float64.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
# Gate gradients are sums of terms of both signs over all of T.
GATE_TOLERANCE = {"float64": 1e-10, "float32": 5e-5, "bfloat16": 1e-2, "float16": 2e-3}
GATES = {"dlog_decay", "dbeta", "da", "db", "dA_log", "ddt_bias"}


def assert_near(name, actual, expected, dtype="float32"):
    """Fail, with the number, where the norm-relative error is beyond the tolerance of `dtype`."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    scale = np.linalg.norm(expected)
    # What must vanish, must vanish to the last bit.
    error = np.linalg.norm(actual - expected) / (scale if scale else np.finfo(np.float64).tiny)
    tolerance = (GATE_TOLERANCE if name in GATES else TOLERANCE)[dtype]
    print(f"{name}: {error:.1e} of {tolerance:.0e}")
    assert error <= tolerance, f"{name}: error {error:.2e} is beyond {tolerance:.0e}"


def operands(
    batch,
    length,
    key_heads,
    value_heads,
    key_dim,
    value_dim,
    *,
    seed=0,
    keys="random",
    decay="mixed",
    beta_max=2.0,
):
    """q, k, v, log_decay, beta, initial_state in numpy float64, keys of length 1."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, length, key_heads, key_dim))
    k = rng.normal(size=q.shape)
    if keys == "correlated":
        # Cosines of about 0.97: the case that a series for the inverse does not survive.
        k = 0.15 * k + rng.normal(size=(1, 1, key_heads, key_dim))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.normal(size=(batch, length, value_heads, value_dim))
    log_decay = -0.2 * rng.exponential(size=v.shape[:-1])
    if decay == "extreme":
        # Exactly 1 and e^−50 among moderate ones: sums of hundreds, whose differences must stay exact.
        kind = rng.integers(3, size=log_decay.shape)
        log_decay = np.where(kind == 0, 0.0, np.where(kind == 1, -50.0, log_decay))
    beta = beta_max * rng.uniform(size=log_decay.shape)
    state = rng.normal(size=(batch, value_heads, key_dim, value_dim))
    return {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta, "initial_state": state}


def cast(tree, dtype):
    """Numpy arrays as jax arrays of `dtype`."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def cotangents(tree, seed=1):
    """Random cotangents like `tree`, so that no gradient is special."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def forward_and_gradients(op, x, **options):
    """`o`, `final_state` and `d…` of every entry of `x`, under random cotangents."""

    def run(x):
        return op(**x, **options, return_final_state=True)

    (o, final_state), vjp = jax.vjp(run, x)
    (gradients,) = vjp(cotangents((o, final_state)))
    return {"o": o, "final_state": final_state} | {f"d{name}": g for name, g in gradients.items()}


def rounded(shape, dtype, **hard):
    """Operands whose q, k and v have a dtype; gates and states are float32."""
    x = {name: np.asarray(y, np.float32) for name, y in operands(*shape, **hard).items()}
    return {name: jnp.asarray(y, dtype if name in ("q", "k", "v") else "float32") for name, y in x.items()}


@functools.lru_cache(maxsize=8)
def _compiled(op):
    """One program of each shape for all tests of an op."""
    return jax.jit(functools.partial(forward_and_gradients, op))


def defined(op, x):
    """Forward and gradients of an op in float64."""
    with jax.enable_x64(True):
        return _compiled(op)(cast(x, "float64"))


def documents():
    """Gates made inside, two rows of packed documents with padding, and the same with NaN in the padding."""
    shape = (2, 75, 1, 2, 64, 64)
    rng = np.random.default_rng(3)
    row = [4] * 20 + [0] * 3 + [4] * 9 + [7] * 20 + [0] * 5 + [2] * 17 + [0]
    segment_ids = jnp.asarray([row, [0] * 40 + [1] * 35], jnp.int32)
    x = {name: y for name, y in cast(operands(*shape, seed=3), "float32").items() if name in "qkv"} | {
        "a": jnp.asarray(rng.normal(size=(*shape[:2], 2)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(*shape[:2], 2)), jnp.float32),
        "A_log": jnp.asarray(rng.normal(size=2), jnp.float32),
        "dt_bias": jnp.asarray(rng.normal(size=2), jnp.float32),
    }
    poisoned = {
        name: y
        if y.ndim == 1
        else jnp.where(jnp.expand_dims(segment_ids == 0, tuple(range(2, y.ndim))), jnp.nan, y)
        for name, y in x.items()
    }
    return x, poisoned, segment_ids
