"""The TPU kernels, interpreted: values, gradients, races, memory, and composition.

`tests/test_tpu_compiler.py` compiles them; the interpreter knows nothing of what a TPU cannot do.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, PartitionSpec
from kernel_operands import assert_near, documents, forward_and_gradients, rounded
from kernel_operands import defined as expected

from kernels_pallas import gated_delta_rule, gated_delta_rule_from_gates
from kernels_pallas.gated_delta_rule import mosaic_tpu, tiling
from kernels_pallas.gated_delta_rule.implementations import STATES

# Two cores, memory that begins as NaN; a race or a read past the end raises.
STRICT = pltpu.InterpretParams(
    detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan", out_of_bounds_reads="raise"
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 32 tokens: a round of what happens between tiles, and several chunks in few tokens.

    Packs of two heads have half of that, no round, and a case of their own with more.
    """
    monkeypatch.setattr(tiling, "TPU_CHUNK", 32)


@pytest.fixture(autouse=True)
def no_races(capfd):
    """Newer jax raises where it finds a race, older only prints."""
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out


def interpreted(op, x, params=STRICT):
    with pltpu.force_tpu_interpret_mode(params):
        result = jax.jit(functools.partial(forward_and_gradients, op))(x)
        return jax.tree.map(np.asarray, result)


KERNEL = functools.partial(gated_delta_rule, implementation="mosaic_tpu")
REFERENCE = functools.partial(gated_delta_rule, implementation="reference")

# name: ((B, T, H, G, K, V), dtype, what is hard, options)
CASES = {
    "one_token": ((1, 1, 1, 2, 64, 64), "float32", {}, {}),
    "grouped_and_odd_sizes": ((2, 70, 2, 4, 60, 20), "float32", {"keys": "correlated"}, {}),
    "extreme_decay": ((1, 64, 1, 1, 64, 128), "float32", {"decay": "extreme"}, {"qk_norm_eps": 1e-6}),
    "bf16_correlated": ((1, 96, 1, 2, 128, 64), "bfloat16", {"keys": "correlated", "beta_max": 1.0}, {}),
    "bf16_extreme": ((1, 96, 2, 2, 64, 256), "bfloat16", {"decay": "extreme"}, {"qk_norm_eps": 1e-6}),
    "bf16_beta_near_2": (
        (1, 96, 1, 1, 64, 64),
        "bfloat16",
        {"keys": "correlated"},
        {"inverse_precision": "highest"},
    ),
}


# Two heads of 64 side by side in chunks of 32: each with its key head and its norm, and four on two key heads.
PACKS = {
    "packs": (
        (1, 80, 2, 2, 64, 64),
        "bfloat16",
        {"keys": "correlated"},
        {"qk_norm_eps": 1e-6, "inverse_precision": "highest"},
    ),
    "packs_share_keys": ((1, 70, 2, 4, 64, 48), "float32", {"keys": "correlated"}, {}),
}


@pytest.mark.parametrize("case", PACKS)
@pytest.mark.slow
def test_packs_equal_definition(case, monkeypatch):
    monkeypatch.setattr(tiling, "TPU_CHUNK", 64)
    shape, dtype, hard, options = PACKS[case]
    x = rounded(shape, dtype, **hard)
    actual = interpreted(functools.partial(KERNEL, **options), x)
    wanted = expected(functools.partial(REFERENCE, **options), x)
    for name, value in actual.items():
        assert_near(name, value, wanted[name], dtype)


def test_heads_pack_where_two_fill_the_lanes():
    """Narrow keys and values, an even number of heads, and a key head each or an even share of one."""

    def pack(key_heads, value_heads, key_dim, value_dim):
        q = jnp.zeros((1, 200, key_heads, key_dim), jnp.bfloat16)
        v = jnp.zeros((1, 200, value_heads, value_dim), jnp.bfloat16)
        plan = mosaic_tpu.make_plan(q, v, scale=1.0, qk_norm_eps=None, inverse_precision=None, padded=False)
        assert plan.chunk * plan.pack == tiling.TPU_CHUNK
        assert plan.heads * plan.pack <= 4 * tiling.TPU_HEADS
        return plan.pack

    assert [pack(16, 16, 64, 64), pack(2, 4, 60, 20), pack(2, 8, 64, 64)] == [2, 2, 2]
    assert [pack(3, 3, 64, 64), pack(2, 6, 64, 64), pack(2, 2, 128, 64), pack(2, 2, 64, 128)] == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["TPU v6 lite", "TPU v5 lite"])
@pytest.mark.slow
def test_every_kind_of_chip_computes_the_same(kind, monkeypatch):
    """Where a bundle stores one register the kernels are cut into more regions: two heads walk, then the third."""
    monkeypatch.setattr(mosaic_tpu, "_target_kind", lambda: kind)
    x = rounded((1, 40, 3, 3, 64, 128), "float32")
    actual, wanted = interpreted(KERNEL, x), expected(REFERENCE, x)
    for name, value in actual.items():
        assert_near(name, value, wanted[name])


@pytest.mark.parametrize("case", CASES)
def test_equals_definition(case):
    shape, dtype, hard, options = CASES[case]
    x = rounded(shape, dtype, **hard)
    actual = interpreted(functools.partial(KERNEL, **options), x)
    wanted = expected(functools.partial(REFERENCE, **options), x)
    assert actual["o"].dtype == dtype
    assert actual["final_state"].dtype == "float32"
    for name, value in actual.items():
        assert_near(name, value, wanted[name], dtype)


@pytest.mark.slow
def test_gates_norm_documents_and_padding_inside():
    """Gates made inside, documents that begin inside a chunk and at its edge, padding of NaN, no initial state."""
    x, poisoned, segment_ids = documents()
    op = functools.partial(
        gated_delta_rule_from_gates, segment_ids=segment_ids, qk_norm_eps=1e-6, beta_max=2.0
    )
    actual = interpreted(functools.partial(op, implementation="mosaic_tpu"), poisoned)
    wanted = expected(functools.partial(op, implementation="reference"), x)
    for name, value in actual.items():
        assert_near(name, value, wanted[name])


def test_a_planted_race_is_found(monkeypatch, capfd):
    """Were chunks allowed to run on two cores, both would write the final state."""
    monkeypatch.setattr(mosaic_tpu, "_GRID", ("parallel",) * 3)
    x = rounded((1, 64, 1, 1, 64, 64), "float32")
    with pltpu.force_tpu_interpret_mode(STRICT):
        try:
            jax.block_until_ready(KERNEL(**x, return_final_state=True))
            found = capfd.readouterr().out
        except jax.errors.JaxRuntimeError as error:
            found = str(error)
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" in found


@pytest.mark.slow
def test_gate_gradients_keep_their_direction():
    """Sums over all tokens of terms that cancel: dA_log and ddt_bias, bfloat16, keys nearly equal, slow decay."""
    shape = (1, 128, 1, 2, 128, 128)
    x = rounded(shape, "bfloat16", keys="correlated", seed=5)
    rng = np.random.default_rng(5)
    gates = {
        "a": jnp.asarray(rng.normal(size=(*shape[:2], 2)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(*shape[:2], 2)), jnp.float32),
        "A_log": jnp.asarray([-3.0, 0.5], jnp.float32),
        "dt_bias": jnp.asarray([-4.0, -1.0], jnp.float32),
    }
    x = {name: x[name] for name in "qkv"} | gates
    actual = interpreted(functools.partial(gated_delta_rule_from_gates, implementation="mosaic_tpu"), x)
    wanted = expected(functools.partial(gated_delta_rule_from_gates, implementation="reference"), x)
    for name in ("da", "db", "dA_log", "ddt_bias"):
        ours, theirs = (np.asarray(y[name], np.float64).ravel() for y in (actual, wanted))
        cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
        print(f"{name}: cosine {cosine:.6f}")
        assert cosine >= 0.999, (name, cosine)


@pytest.mark.slow
def test_composes_with_vmap_and_shard_map():
    """A batch of calls inside a shard_map, its checks on, equals one call of all sequences."""
    x = rounded((2, 40, 1, 1, 64, 64), "float32", seed=7)

    def one(x):
        return jax.tree.map(
            lambda y: y[0], KERNEL(**{name: y[None] for name, y in x.items()}, return_final_state=True)
        )

    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    data = PartitionSpec("data")
    split = jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=data, out_specs=data)
    composed = interpreted(lambda return_final_state, **x: split(x), x, pltpu.InterpretParams())
    for name, value in interpreted(KERNEL, x).items():
        np.testing.assert_array_equal(composed[name], value, name)


@pytest.mark.slow
def test_composes_with_checkpoint():
    """Rematerialised but for its states, by name."""
    x = rounded((1, 40, 1, 1, 64, 64), "float32", seed=7)
    policy = jax.checkpoint_policies.save_only_these_names(STATES)
    op = jax.checkpoint(lambda x: KERNEL(**x, return_final_state=True), policy=policy)
    # The TPU interpreter has effects, which are refused under jax.checkpoint; Pallas' plain one has none.
    composed = interpreted(lambda return_final_state, **x: op(x), x, True)
    for name, value in interpreted(KERNEL, x).items():
        assert_near(name, composed[name], value)


def test_saves_one_state_per_chunk():
    """Beyond its inputs: 2·K·V/C bytes per token and value head in bfloat16, twice that in float32."""
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        x = rounded((1, 96, 1, 2, 64, 128), dtype)
        with pltpu.force_tpu_interpret_mode(STRICT):
            _, vjp = jax.eval_shape(functools.partial(jax.vjp, lambda x: KERNEL(**x)[0]), x)
        saved = sum(y.size * y.dtype.itemsize for y in jax.tree.leaves(vjp))
        inputs = sum(y.size * y.dtype.itemsize for y in x.values())
        assert 0 < saved - inputs <= size * 64 * 128 * (96 // 32) * 2


def test_refuses_by_name(monkeypatch):
    x = rounded((1, 8, 1, 2, 64, 64), "float32")
    with pytest.raises(NotImplementedError, match="runs on TPUs; this is a cpu"):
        KERNEL(**x)
    with pltpu.force_tpu_interpret_mode(STRICT):
        half = x | {name: x[name].astype("float16") for name in "qkv"}
        with pytest.raises(NotImplementedError, match="all be bfloat16 or all float32; got float16"):
            KERNEL(**half)
        wide = rounded((1, 8, 1, 1, 300, 64), "float32")
        with pytest.raises(NotImplementedError, match="K must be at most 256; got 300"):
            KERNEL(**wide)
        # Named implementations never fall back; None does not take an interpreter.
        assert np.isfinite(gated_delta_rule(**x)[0]).all()


@pytest.mark.slow
def test_values_wider_than_a_kernel_are_split():
    x = rounded((1, 20, 1, 1, 64, 300), "float32")
    actual, wanted = interpreted(KERNEL, x), expected(REFERENCE, x)
    for name, value in actual.items():
        assert_near(name, value, wanted[name])
