"""The Hopper kernels on a Hopper GPU: accuracy, many contents of few compiled signatures, repeats.

`JAX_PLATFORMS=cuda python -m pytest tests/test_kernel_gpu_card.py`; skipped where there is no such GPU.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_operands import defined, forward_and_gradients, operands, rounded

from kernels_pallas import gated_delta_rule
from kernels_pallas.gated_delta_rule import mosaic_gpu

pytestmark = pytest.mark.skipif(not mosaic_gpu.runs_here(), reason="needs a Hopper GPU")

KERNEL = functools.partial(gated_delta_rule, implementation="mosaic_gpu")
REFERENCE = functools.partial(gated_delta_rule, implementation="reference")
CHUNKED = functools.partial(gated_delta_rule, implementation="chunked")


def floors_of(x, expected):
    """What a result's error may be a share of beside its norm, by name.

    Entries are about 1, so each has a floor of 1e-5 (β = 0 is taken for 2^−24). By eq. (26) d log α sums products of q
    with dq and of k with dk, which all but cancel where a token forgets: the norm of their absolute values.
    """
    q, k, dq, dk = (
        np.abs(np.asarray(y, np.float64)) for y in (x["q"], x["k"], expected["dq"], expected["dk"])
    )
    floors = {name: 1e-5 * np.sqrt(np.size(y)) for name, y in expected.items()}
    floors["dlog_decay"] += np.linalg.norm(np.sum(q * dq + k * dk, axis=-1))
    return floors


def errors(x, actual, expected):
    """‖actual − expected‖ / (‖expected‖ + its floor) by name."""
    floors = floors_of(x, expected)
    found = {}
    for name, value in actual.items():
        value, wanted = (np.asarray(y, np.float64) for y in (value, expected[name]))
        assert np.all(np.isfinite(value)), name
        size = np.linalg.norm(wanted) + floors[name]
        found[name] = np.linalg.norm(value - wanted) / size
    return found


# (T, K = V); T = 8,192 once, since the definition takes its time token by token.
@pytest.mark.parametrize(
    ("length", "dim"), [(1024, 64), (1024, 128), (1024, 256), (8192, 64), (8192, 128), (8192, 256)]
)
@pytest.mark.parametrize("keys", ["random", "correlated"])
@pytest.mark.parametrize("decay", ["mixed", "extreme"])
def test_accuracy(length, dim, keys, decay):
    """β to 2, decays of exactly 1 and of e^−50: 0.5 % of the norm, 1 % where keys are nearly equal."""
    x = rounded((1, length, 1, 1, dim, dim), "bfloat16", keys=keys, decay=decay)
    actual = compiled("mosaic_gpu")(x)
    found = errors(x, actual, defined(REFERENCE, x))
    print({name: f"{error:.1e}" for name, error in found.items()})
    tolerance = 0.01 if keys == "correlated" else 0.005
    assert max(found.values()) <= tolerance, found


@pytest.mark.parametrize(
    ("dim", "dtype"), [(64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (128, "float16")]
)
def test_accuracy_of_norms_inside(dim, dtype):
    """Queries and keys of lengths from 0.1 to 30: as near as 0.5 %, or as where they come with length 1.

    The latter since a dβ with a few large entries, as these have at 256, is off by 0.6 % either way.
    """
    x = rounded((1, 1024, 1, 2, dim, dim), dtype)
    rng = np.random.default_rng(6)
    for name in "qk":
        lengths = 10.0 ** rng.uniform(-1, 1.5, size=(1, 1024, 1, 1))
        x[name] = (x[name].astype("float32") * lengths).astype(dtype)
    normed = {name: np.asarray(x[name], np.float64) for name in "qk"}
    normed = {name: y / np.linalg.norm(y, axis=-1, keepdims=True) for name, y in normed.items()}
    unit = x | {name: jnp.asarray(y, jnp.float32).astype(dtype) for name, y in normed.items()}
    actual = compiled("mosaic_gpu", qk_norm_eps=1e-6)(x)
    found = errors(x, actual, defined(functools.partial(REFERENCE, qk_norm_eps=1e-6), x))
    outside = errors(unit, compiled("mosaic_gpu")(unit), defined(REFERENCE, unit))
    print({name: f"{error:.1e}, outside {outside[name]:.1e}" for name, error in found.items()})
    for name, error in found.items():
        assert error <= max(0.005, 1.25 * outside[name]), (name, error, outside[name])


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_accuracy_of_float16(dim):
    """Three more bits than bfloat16 has."""
    x = rounded((1, 1024, 1, 1, dim, dim), "float16")
    found = errors(x, compiled("mosaic_gpu")(x), defined(REFERENCE, x))
    print({name: f"{error:.1e}" for name, error in found.items()})
    assert max(found.values()) <= 0.001, found


@functools.cache
def compiled(implementation, **options):
    op = functools.partial(gated_delta_rule, implementation=implementation, **options)
    return jax.jit(functools.partial(forward_and_gradients, op))


# B, T, H, G, K, V.
SIGNATURES = [
    (2, 1, 1, 1, 64, 64),
    (1, 37, 2, 2, 64, 64),
    (3, 64, 1, 2, 64, 64),
    (2, 65, 2, 4, 128, 128),
    (1, 200, 1, 1, 128, 128),
    (2, 512, 2, 2, 64, 128),
    (1, 700, 1, 4, 128, 256),
    (1, 330, 2, 2, 256, 256),
    (2, 129, 1, 1, 256, 64),
    (1, 1024, 4, 4, 128, 128),
    (1, 190, 2, 2, 96, 192),
    (2, 300, 1, 3, 32, 48),
    (1, 256, 1, 1, 128, 512),
    (4, 128, 2, 2, 64, 256),
    (1, 2048, 1, 2, 64, 64),
    (1, 450, 3, 3, 20, 100),
]


def contents(shape):
    """13 sets of operands of one signature, with ids of documents: what differs is gates, keys, documents, states."""
    batch, length = shape[:2]

    def make(seed, change=lambda x: None, ids=None, **hard):
        x = operands(*shape, seed=seed, **hard)
        change(x)
        return x, np.ones((batch, length), np.int32) if ids is None else ids

    def documents(seed, padding):
        rng = np.random.default_rng(seed)
        ids = np.cumsum(rng.uniform(size=(batch, length)) < 0.05, axis=1).astype(np.int32) + 1
        return np.where(rng.uniform(size=ids.shape) < padding, 0, ids)

    def setting(**values):
        def change(x):
            for name, value in values.items():
                x[name] = np.broadcast_to(value, x[name].shape).copy()

        return change

    def no_writes_here_and_there(x):
        x["beta"][:, ::3] = 0.0

    def large_values(x):
        x["v"] *= 100.0

    return [
        make(0),
        make(1, decay="extreme"),
        make(2, setting(log_decay=-1e-3)),
        make(3, setting(log_decay=0.0), beta_max=1.0),
        make(4, setting(log_decay=-50.0)),
        make(5, beta_max=1.0),
        make(6, no_writes_here_and_there),
        make(7, keys="correlated", beta_max=1.0),
        make(8, ids=documents(8, 0.0)),
        make(9, ids=documents(9, 0.2)),
        make(10, setting(initial_state=0.0), ids=documents(10, 0.02), decay="extreme"),
        make(11, large_values),
        make(12, setting(beta=2.0), keys="correlated", decay="mixed"),
    ]


@pytest.mark.parametrize("shape", SIGNATURES, ids=str)
def test_contents_of_a_signature(shape):
    """One compiled program each; whatever it is given, the chunked form in float32 gives the same."""

    def run(op, dtype, x, ids):
        x = x | {name: x[name].astype(dtype) for name in "qkv"}
        return forward_and_gradients(functools.partial(op, segment_ids=ids), x)

    ours = jax.jit(functools.partial(run, KERNEL, jnp.bfloat16))
    theirs = jax.jit(functools.partial(run, CHUNKED, jnp.float32))
    worst = {}
    for number, (x, ids) in enumerate(contents(shape)):
        x = {name: jnp.asarray(y, jnp.bfloat16 if name in "qkv" else jnp.float32) for name, y in x.items()}
        # The kernels take β = 0 for 2^−24, as the op's README says: a dk of 1e-6 where there is none, if all else is 0.
        found = errors(x, ours(x, ids), theirs(x | {"beta": jnp.maximum(x["beta"], 2.0**-24)}, ids))
        for name, error in found.items():
            worst[name] = max(worst.get(name, (0.0, 0)), (error, number))
        first, again = ours(x, ids), ours(x, ids)
        for name, value in first.items():
            np.testing.assert_array_equal(value, again[name], name)
    print({name: f"{error:.1e} in {number}" for name, (error, number) in worst.items()})
    # Seen: 1.0 % at β = 2 with nearly equal keys, 1.3 % for the dβ of a single token, where no rounding averages out.
    assert max(worst.values())[0] <= 0.02, worst


def test_vmap_folds_into_the_batch():
    """Eight calls at once are one call of the eightfold batch, bit for bit."""
    x = rounded((8, 512, 2, 2, 128, 128), "bfloat16")

    def one(x):
        o, final = KERNEL(**{name: y[None] for name, y in x.items()}, return_final_state=True)
        return o[0], final[0]

    ones, once = jax.jit(jax.vmap(one)), jax.jit(functools.partial(KERNEL, return_final_state=True))
    for a, b in zip(ones(x), once(**x), strict=True):
        np.testing.assert_array_equal(a, b)


def test_first_call_compiles_within_a_minute():

    x = rounded((1, 4096, 4, 4, 128, 128), "bfloat16", seed=3)
    began = time.perf_counter()
    jax.jit(functools.partial(forward_and_gradients, KERNEL)).lower(x).compile()
    assert time.perf_counter() - began < 60
