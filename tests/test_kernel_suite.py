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
# bfloat16 is float32 inside but for its chunk states: the long cases, which share one program, show it.
CASES_AND_DTYPES = [
    (case, dtype)
    for case in CASES
    for dtype in ("float64", "float32", "bfloat16")
    if dtype != "bfloat16" or case.startswith("long")
]


@functools.cache
def compiled(implementation, op=gated_delta_rule):
    """Forward and gradients, compiled once per shape and dtype for all the tests below."""
    return jax.jit(functools.partial(forward_and_gradients, op, implementation=implementation))


@functools.cache
def forward(implementation):
    return jax.jit(lambda x: gated_delta_rule(**x, return_final_state=True, implementation=implementation))


@functools.cache
def expected(case, dtype):
    """The definition in float64, on inputs and cotangents already rounded to `dtype`."""
    shape, hard = CASES[case]
    with jax.enable_x64(True):
        rounded = cast(operands(*shape, **hard), dtype)
        rounded["initial_state"] = rounded["initial_state"].astype(
            "float32" if dtype == "bfloat16" else dtype
        )
        return rounded, compiled("reference")(cast(rounded, "float64"))


@pytest.mark.parametrize(("case", "dtype"), CASES_AND_DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_definition(implementation, case, dtype):
    x, wanted = expected(case, dtype)
    with jax.enable_x64(dtype == "float64"):
        actual = compiled(implementation)(x)
    assert actual["o"].dtype == dtype
    assert actual["final_state"].dtype == ("float64" if dtype == "float64" else "float32")
    for name, value in actual.items():
        assert_near(name, value, wanted[name], dtype)


# One shape for every law, so that few programs are compiled. T is no multiple of any chunk length.
LAW_SHAPE = (2, 70, 2, 4, 12, 20)


@functools.cache
def law_operands():
    with jax.enable_x64(True):
        return cast(operands(*LAW_SHAPE, keys="correlated", seed=2), "float64")


@functools.cache
def packed(implementation):
    """Forward and gradients with documents: ids are an operand that nobody differentiates."""

    def run(x, segment_ids):
        return forward_and_gradients(
            functools.partial(gated_delta_rule, segment_ids=segment_ids, implementation=implementation), x
        )

    return jax.jit(run)


def part(x, start, stop, batch=slice(None)):
    """Tokens start … stop of every operand but the state."""
    return {name: y[batch] if name == "initial_state" else y[batch, start:stop] for name, y in x.items()}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("implementation", LAWFUL)
class TestLaws:
    def test_packed_documents_equal_documents_apart(self, implementation):
        # Row 0: documents of 17, 30 and 15 tokens; 3 and then 4 of padding, the first between tokens of one
        # document, which goes on after it; 1 at the end. Row 1: padding first, then one document.
        row = [5] * 10 + [0] * 3 + [5] * 7 + [9] * 30 + [0] * 4 + [2] * 15 + [0]
        segment_ids = jnp.asarray([row, [0] * 8 + [1] * 62], jnp.int32)
        x = law_operands()
        padding = segment_ids == 0
        poisoned = {
            name: y
            if name == "initial_state"
            else jnp.where(jnp.expand_dims(padding, range(2, y.ndim)), jnp.nan, y)
            for name, y in x.items()
        }
        run = packed(implementation)
        together = run(poisoned, segment_ids)

        weights = cotangents((together["o"], together["final_state"]))
        starts = {}
        # Each document alone, without ids, under the same cotangents.
        for batch, kept, first, last in (
            (0, [*range(10), *range(13, 20)], True, False),
            (0, list(range(20, 50)), False, False),
            (0, list(range(54, 69)), False, True),
            (1, list(range(8, 70)), True, True),
        ):
            at = np.asarray(kept)
            alone = {
                name: y[batch : batch + 1] if name == "initial_state" else y[batch : batch + 1, at]
                for name, y in x.items()
            }
            if not first:
                alone["initial_state"] = jnp.zeros_like(alone["initial_state"])

            (o, final_state), vjp = jax.vjp(forward(implementation), alone)
            do, dfinal_state = (w[batch : batch + 1] for w in weights)
            (gradients,) = vjp((do[:, at], dfinal_state if last else jnp.zeros_like(dfinal_state)))
            assert_near("o", together["o"][batch : batch + 1, at], o, "float64")
            for name, gradient in gradients.items():
                if name != "initial_state":
                    packed_gradient = together[f"d{name}"][batch : batch + 1, at]
                    # The decay of a document's first token acts on nothing: on zeros when it stands alone.
                    assert_near(f"d{name}", packed_gradient, gradient, "float64")
                elif first:
                    starts[batch] = gradient
            if last:
                assert_near("final_state", together["final_state"][batch : batch + 1], final_state, "float64")
        for batch, gradient in starts.items():
            assert_near("dinitial_state", together["dinitial_state"][batch : batch + 1], gradient, "float64")

        # Padding: exact zeros, from NaN operands.
        for name, value in together.items():
            assert np.isfinite(value).all(), name
            if name not in ("final_state", "dinitial_state"):
                assert not np.asarray(value)[np.asarray(padding)].any(), name

    def test_state_handed_over_equals_one_run(self, implementation):
        x = law_operands()
        whole = compiled(implementation)(x)
        state, pieces = x["initial_state"], []
        for start, stop in ((0, 35), (35, 70)):
            piece = part(x, start, stop) | {"initial_state": state}
            o, state = forward(implementation)(piece)
            pieces.append(o)
        assert_near("o", jnp.concatenate(pieces, axis=1), whole["o"], "float64")
        assert_near("final_state", state, whole["final_state"], "float64")

    def test_step_equals_op(self, implementation):
        x = law_operands()
        whole = compiled(implementation)(x)
        step = jax.jit(functools.partial(gated_delta_step, implementation=implementation))
        state, steps = x["initial_state"], []
        for t in range(LAW_SHAPE[1]):
            o, state = step(*(x[name][:, t] for name in ("q", "k", "v", "log_decay", "beta")), state)
            steps.append(o)
        assert_near("o", jnp.stack(steps, axis=1), whole["o"], "float64")
        assert_near("final_state", state, whole["final_state"], "float64")

    def test_no_gradient_from_the_future(self, implementation):
        x = law_operands()
        middle = 33

        def past(x):
            # Of the middle token's output alone.
            o, _ = gated_delta_rule(**x, implementation=implementation)
            return jnp.sum(o[:, middle])

        gradients = jax.jit(jax.grad(past))(x)
        for name in ("q", "k", "v", "log_decay", "beta"):
            gradient = np.asarray(gradients[name])
            assert not gradient[:, middle + 1 :].any(), name
            assert gradient[:, middle].any(), name
        assert not np.asarray(gradients["q"])[:, :middle].any()
        assert np.asarray(gradients["k"])[:, 0].any()

    def test_grouped_heads_equal_repeated_heads(self, implementation):
        x = law_operands()
        groups = LAW_SHAPE[3] // LAW_SHAPE[2]
        repeated = x | {name: jnp.repeat(x[name], groups, axis=2) for name in ("q", "k")}
        shared, apart = compiled(implementation)(x), compiled(implementation)(repeated)
        for name, value in apart.items():
            if name in ("dq", "dk"):
                value = value.reshape(*x["q"].shape[:3], groups, -1).sum(axis=3)
            assert_near(name, shared[name], value, "float64")

    def test_vmap_equals_loop(self, implementation):
        rows = [operands(*LAW_SHAPE, seed=seed) for seed in (3, 4)]
        stacked = cast(jax.tree.map(lambda *y: np.stack(y), *rows), "float64")
        segment_ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, LAW_SHAPE[:2])), jnp.int32)
        run = packed(implementation)
        # The ids are shared by the points, as a sweep shares its batch.
        together = jax.jit(jax.vmap(run, in_axes=(0, None)))(stacked, segment_ids)
        for index, row in enumerate(rows):
            alone = run(cast(row, "float64"), segment_ids)
            for name, value in alone.items():
                assert_near(name, together[name][index], value, "float64")

    def test_gates_inside_equal_gates_outside(self, implementation):
        x = dict(law_operands())
        rng = np.random.default_rng(5)
        x["a"], x["b"] = x.pop("log_decay"), 4 * x.pop("beta") - 4
        x["A_log"], x["dt_bias"] = cast(list(rng.normal(size=(2, LAW_SHAPE[3]))), "float64")

        def outside(q, k, v, a, b, A_log, dt_bias, **rest):
            q, k = (y / jnp.sqrt(jnp.sum(y**2, axis=-1, keepdims=True) + 1e-6) for y in (q, k))
            # softplus and sigmoid, written out.
            log_decay = -jnp.exp(A_log)[None, None] * jnp.log(1 + jnp.exp(a + dt_bias[None, None]))
            return gated_delta_rule(q, k, v, log_decay, 2 / (1 + jnp.exp(-b)), **rest)

        inside = functools.partial(gated_delta_rule_from_gates, beta_max=2.0, qk_norm_eps=1e-6)
        actual, wanted = (
            jax.jit(functools.partial(forward_and_gradients, op, scale=0.7, implementation=implementation))(x)
            for op in (inside, outside)
        )
        for name, value in wanted.items():
            assert_near(name, actual[name], value, "float64")
