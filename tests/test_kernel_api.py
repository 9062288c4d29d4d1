"""The public ops at their edges: composition with JAX, refusals, the step's inactive rows, the inverse."""

import functools
import importlib
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from kernel_operands import assert_near, cast, forward_and_gradients, operands

from kernels_pallas import gated_delta_rule, gated_delta_rule_from_gates, gated_delta_step
from kernels_pallas.gated_delta_rule.tiling import chunk_and_block
from kernels_pallas.gated_delta_rule.triangular import inverse_by_doubling, inverse_by_substitution

# By name: the op `gated_delta_rule` hides the folder of the same name as an attribute of the package.
chunked = importlib.import_module("kernels_pallas.gated_delta_rule.chunked")
implementations = importlib.import_module("kernels_pallas.gated_delta_rule.implementations")
choice = importlib.import_module("kernels_pallas.gated_delta_rule.choice")

SHAPE = (2, 40, 1, 2, 12, 20)
gradients = jax.jit(functools.partial(forward_and_gradients, gated_delta_rule))


def small(dtype="float32", **options):
    return cast(operands(*SHAPE, **options), dtype)


class TestComposition:
    def test_checkpoint(self):
        x = small()
        remat = jax.checkpoint(lambda x: gated_delta_rule(**x, return_final_state=True))
        actual = jax.jit(functools.partial(forward_and_gradients, lambda return_final_state, **x: remat(x)))(
            x
        )
        for name, value in gradients(x).items():
            assert_near(name, actual[name], value)

    def test_eval_shape(self):
        o, state = jax.eval_shape(
            functools.partial(gated_delta_rule, return_final_state=True), **small("bfloat16")
        )
        assert (o.shape, o.dtype) == ((2, 40, 2, 20), jnp.bfloat16)
        assert (state.shape, state.dtype) == ((2, 2, 12, 20), jnp.float32)
        assert jax.eval_shape(gated_delta_rule, **small())[1] is None

    @pytest.mark.parametrize("axes", ["batch", "heads"])
    @pytest.mark.slow
    def test_shard_map(self, axes):
        # Two emulated devices need their own process: the flag is read when JAX starts.
        environment_line = "import os; os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'"
        code = f"""
{environment_line}
import functools, sys
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
import test_kernel_api
test_kernel_api.sharded_equals_whole({axes!r})
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    def test_vmapped_training_step(self):
        """A whole step under vmap over the learning rate and a traced scale, as a packed sweep runs it."""
        x = small()
        names = ("q", "k", "v")

        def step(learning_rate, scale):
            def loss(p):
                o, _ = gated_delta_rule(**(x | p), scale=scale, qk_norm_eps=1e-6)
                return jnp.mean((o - 1) ** 2)

            p = {name: x[name] for name in names}
            value, gradient = jax.value_and_grad(loss)(p)
            return value, jax.tree.map(lambda y, g: y - learning_rate * g, p, gradient)

        rates, scales = jnp.asarray([0.1, 0.5]), jnp.asarray([0.3, 1.0])
        packed_value, packed = jax.jit(jax.vmap(step))(rates, scales)
        for index in range(2):
            value, alone = jax.jit(step)(rates[index], scales[index])
            assert_near("loss", packed_value[index], value)
            for name in names:
                assert_near(name, packed[name][index], alone[name])

    def test_saves_only_chunk_states(self):
        """What a forward pass keeps for its gradient: its operands and bfloat16 states, nothing per token pair."""
        x = small("bfloat16")
        _, vjp = jax.eval_shape(lambda x: jax.vjp(lambda y: gated_delta_rule(**y)[0], x), x)
        chunks = -(-SHAPE[1] // chunk_and_block(2, 40, 2, 20, "cpu")[0])
        states = [y for y in jax.tree.leaves(vjp) if y.shape[-2:] == (12, 20) and y.ndim > 4]
        assert [y.dtype for y in states] == [jnp.bfloat16]
        assert states[0].size == chunks * 2 * 2 * 12 * 20
        largest = max(y.size for y in jax.tree.leaves(vjp) if y is not states[0])
        assert largest == x["v"].size

    def test_scale_gradient(self):
        x = small()
        wanted = {}
        for implementation in ("reference", "chunked"):
            wanted[implementation] = jax.jit(
                jax.grad(
                    lambda s, i=implementation: jnp.sum(gated_delta_rule(**x, scale=s, implementation=i)[0])
                )
            )(jnp.float32(0.4))
        assert_near("dscale", wanted["chunked"], wanted["reference"])


def sharded_equals_whole(axes):
    """Run by `test_shard_map` where there are two devices."""
    assert jax.device_count() == 2
    x = cast(operands(2, 40, 2, 4, 12, 20), "float32")
    rest = P("x") if axes == "batch" else P(None, None, "x")
    specs = {name: rest for name in x} | {"initial_state": P("x") if axes == "batch" else P(None, "x")}
    shared = {"A_log": jnp.asarray([-1.0, 0.0, 0.5, 1.0]), "dt_bias": jnp.zeros(4)}
    gate_specs = {name: P() if axes == "batch" else P("x") for name in shared}
    ids = jnp.asarray(np.repeat([[1] * 11 + [0] * 4 + [2] * 25], 2, axis=0), jnp.int32)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def op(x, gates, ids):
        q, k, v, a, b = (x[name] for name in ("q", "k", "v", "log_decay", "beta"))
        for state in ({}, {"initial_state": x["initial_state"]}):
            # Without an initial state the carry of the scan begins with zeros, which vary over no axis.
            o, final_state = gated_delta_rule_from_gates(
                q,
                k,
                v,
                a,
                b,
                gates["A_log"],
                gates["dt_bias"],
                segment_ids=ids,
                return_final_state=True,
                **state,
            )
        return o, final_state

    sharded = jax.shard_map(
        op,
        mesh=mesh,
        in_specs=(specs, gate_specs, P("x") if axes == "batch" else P()),
        out_specs=(rest, specs["initial_state"]),
    )

    def loss(op, x, gates):
        o, final_state = op(x, gates, ids)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(final_state))

    for one, two in zip(
        *(
            jax.tree.leaves(
                jax.jit(jax.value_and_grad(functools.partial(loss, f), argnums=(0, 1)))(x, shared)
            )
            for f in (op, sharded)
        ),
        strict=True,
    ):
        assert_near("sharded", two, one)


class TestStep:
    def test_inactive_rows(self):
        x = small()
        one = {name: y if name == "initial_state" else y[:, 0] for name, y in x.items()}
        state = one.pop("initial_state")
        poisoned = {name: y.at[0].set(jnp.nan) for name, y in one.items()}
        o, after = gated_delta_step(**poisoned, state=state, active=jnp.asarray([False, True]))
        o_all, after_all = gated_delta_step(**one, state=state)
        assert not np.asarray(o)[0].any()
        np.testing.assert_array_equal(after[0], state[0])
        np.testing.assert_array_equal(o[1], o_all[1])
        np.testing.assert_array_equal(after[1], after_all[1])


class TestInverse:
    @pytest.mark.parametrize("size", [1, 2, 16, 64])
    @pytest.mark.parametrize("inverse", [inverse_by_doubling, inverse_by_substitution])
    def test_correlated_keys(self, inverse, size):
        # β = 1 and keys all but equal: a series would be off by 6e10 at 64.
        rng = np.random.default_rng(0)
        k = 0.1 * rng.normal(size=(3, size, 16)) + rng.normal(size=(3, 1, 16))
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        a = np.tril(k @ np.swapaxes(k, -1, -2), -1)
        wanted = np.linalg.inv(np.eye(size) + a)
        # Above the diagonal nothing is read.
        poisoned = jnp.asarray(np.where(np.tri(size, k=-1) > 0, a, np.nan), jnp.float32)
        assert_near("inverse", jax.jit(inverse)(poisoned), wanted)

    def test_inverse_precision_is_taken(self):
        lowered = jax.jit(functools.partial(inverse_by_doubling, precision=jax.lax.Precision.HIGH)).lower(
            jnp.zeros((4, 4))
        )
        assert "precision = [HIGH, HIGH]" in lowered.as_text()
        o, _ = gated_delta_rule(**small(), inverse_precision=jax.lax.Precision.HIGH)
        assert_near("o", o, gradients(small())["o"])


class TestChunks:
    @pytest.mark.parametrize(("chunk", "block"), [(8, 8), (32, 64), (64, 64)])
    def test_length_does_not_matter(self, monkeypatch, chunk, block):
        x = small(keys="correlated")
        wanted = gradients(x)
        monkeypatch.setattr(implementations.tiling, "chunk_and_block", lambda *sizes: (chunk, block))
        actual = jax.jit(lambda x: forward_and_gradients(gated_delta_rule, x))(x)
        for name, value in wanted.items():
            assert_near(name, actual[name], value)

    @pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
    @pytest.mark.parametrize("length", [1, 3, 64, 65, 4096])
    def test_tiling_fits(self, platform, length):
        chunk, block = chunk_and_block(2, length, 4, 64, platform)
        assert chunk & (chunk - 1) == 0
        assert block % chunk == 0
        # Never more filling than a chunk for each block.
        blocks = -(-length // block)
        assert blocks * (block - chunk) < length

    def test_sums_survive_a_large_decay(self):
        log_decay = np.full(64, -0.01)
        log_decay[3:20] = -50.0
        log_decay[30] = -np.inf
        coarse, fine = (
            np.asarray(x, np.float64) for x in chunked._log_decay_sums(jnp.asarray(log_decay, jnp.float32))
        )
        # Between the large ones, and after them all.
        for start, stop in ((20, 29), (31, 63)):
            between = (coarse[stop] - coarse[start]) + (fine[stop] - fine[start])
            assert abs(between + 0.01 * (stop - start)) < 1e-7


@pytest.mark.usefixtures("unchecked_annotations")
class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"q": jnp.zeros((2, 40, 12))}, "q must have the axes"),
            ({"q": jnp.zeros((2, 40, 1, 12), int)}, "q must be floating point; got int32"),
            ({"k": jnp.zeros((2, 40, 1, 13))}, "k must have the shape"),
            ({"v": jnp.zeros((2, 41, 2, 20))}, "v must begin with the same B, T"),
            (
                {"q": jnp.zeros((2, 40, 3, 12)), "k": jnp.zeros((2, 40, 3, 12))},
                "multiple of q's and k's; got 2 and 3",
            ),
            ({"beta": jnp.zeros((2, 40, 1))}, "beta must have the shape"),
            ({"log_decay": jnp.ones((2, 40, 2))}, r"log_decay must be in \[-inf, 0\]; got 1"),
            ({"beta": jnp.full((2, 40, 2), 2.5)}, r"beta must be in \[0, 2\]; got 2.5"),
            ({"initial_state": jnp.zeros((2, 2, 20, 12))}, "initial_state must have the shape"),
            ({"segment_ids": jnp.zeros((2, 39), int)}, "segment_ids must have the shape"),
            ({"segment_ids": jnp.zeros((2, 40))}, "segment_ids must be integers"),
            ({"segment_ids": jnp.full((2, 40), -1)}, "segment_ids must be ≥ 0; got -1"),
            ({"scale": jnp.ones(2)}, "scale must be one number"),
            ({"qk_norm_eps": 0.0}, "qk_norm_eps must be positive"),
            ({"implementation": "fast"}, "implementation must be None or one of"),
        ],
    )
    def test_value_error(self, change, words):
        with pytest.raises(ValueError, match=words):
            gated_delta_rule(**(small() | change))

    def test_no_tokens(self):
        empty = {name: y if name == "initial_state" else y[:, :0] for name, y in small().items()}
        with pytest.raises(ValueError, match="no axis of length 0"):
            gated_delta_rule(**empty)

    def test_gates(self):
        x = small()
        operands_ = [x[name] for name in ("q", "k", "v", "log_decay", "beta")]
        with pytest.raises(ValueError, match="A_log must have the shape"):
            gated_delta_rule_from_gates(*operands_, jnp.zeros(1), jnp.zeros(2))
        with pytest.raises(ValueError, match=r"beta_max must be in \(0, 2\]; got 3"):
            gated_delta_rule_from_gates(*operands_, jnp.zeros(2), jnp.zeros(2), beta_max=3.0)

    def test_an_explicit_mesh(self):
        mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
        x = small()
        x["v"] = jax.device_put(x["v"], jax.NamedSharding(mesh, P("x")))
        with (
            jax.set_mesh(mesh),
            pytest.raises(ValueError, match=r"v must not be split over .* Explicit.*Auto"),
        ):
            jax.eval_shape(lambda x: gated_delta_rule(**x), x)

    def test_step(self):
        x = {name: y if name == "initial_state" else y[:, 0] for name, y in small().items()}
        state = x.pop("initial_state")
        with pytest.raises(ValueError, match="state must have the shape"):
            gated_delta_step(**x, state=state[:, :1])
        with pytest.raises(ValueError, match="active must be boolean"):
            gated_delta_step(**x, state=state, active=jnp.ones(2, int))

    @pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])
    def test_cannot_here(self, name):
        with pytest.raises(NotImplementedError, match=name):
            gated_delta_rule(**small(), implementation=name)


def test_padding_may_hold_anything():
    x = small()
    ids = jnp.ones((2, 40), int).at[:, 30:].set(0)
    x["beta"] = x["beta"].at[:, 30:].set(7.0)
    x["log_decay"] = x["log_decay"].at[:, 30:].set(7.0)
    o, _ = gated_delta_rule(**x, segment_ids=ids)
    assert not np.asarray(o)[:, 30:].any()


def test_choice_is_logged_once(caplog):
    choice._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels_pallas"):
        for _ in range(2):
            # A new function each time: one that JAX has traced already is not called again.
            jax.eval_shape(lambda x: gated_delta_rule(**x), small())
    assert [r.getMessage() for r in caplog.records] == [
        "gated_delta_rule: implementation=None takes 'chunked': the fastest form that runs on every platform"
    ]


def test_a_hopper_gpu_takes_its_kernels_where_it_can(monkeypatch):
    monkeypatch.setattr(implementations.mosaic_gpu, "runs_here", lambda: True)
    x = small()
    narrow = {name: y.astype(jnp.bfloat16) for name, y in x.items() if name in "qkv"}

    def chosen(q, k, v, precision=None):
        operands = implementations.Operands(q, k, v, x["log_decay"], x["beta"], None, None, None, None)
        return choice.choose(None, operands, precision)

    assert chosen(**narrow) == "mosaic_gpu"
    # What they cannot do is done by plain JAX, and only what names them is refused.
    assert chosen(**narrow, precision="highest") == "chunked"
    assert chosen(x["q"], x["k"], x["v"]) == "chunked"
