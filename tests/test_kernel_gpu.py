"""The Hopper kernels, interpreted: values, gradients, races, and composition.

The interpreter knows nothing of what a GPU cannot do; `kernels_pallas.gated_delta_rule.bench` runs them on one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, Mesh, PartitionSpec
from kernel_operands import assert_near, defined, documents, forward_and_gradients, rounded

from kernels_pallas import gated_delta_rule, gated_delta_rule_from_gates
from kernels_pallas.gated_delta_rule import mosaic_gpu, mosaic_gpu_kernel, tiling

# Memory that begins as NaN; a race or a read past the end raises.
STRICT = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")

KERNEL = functools.partial(gated_delta_rule, implementation="mosaic_gpu")
REFERENCE = functools.partial(gated_delta_rule, implementation="reference")


@pytest.fixture(autouse=True)
def no_races(capfd):
    """Newer jax raises where it finds a race, older only prints."""
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out


def check(op, reference, x, tolerance="bfloat16"):
    """What the kernels give for `op` is what the definition gives, and gradients too, sequence by sequence."""
    actual, wanted = interpreted(op, x), defined(reference, x)
    for name, value in actual.items():
        for one, wanted_one in zip(value, wanted[name], strict=True):
            assert_near(name, one, wanted_one, tolerance)
    return actual


def interpreted(op, x):
    with plgpu.force_gpu_interpret_mode(STRICT):
        result = jax.jit(functools.partial(forward_and_gradients, op))(x)
        return jax.tree.map(np.asarray, result)


# name: ((B, T, H, G, K, V), what is hard, options)
CASES = {
    "one_token": ((1, 1, 1, 1, 64, 64), {}, {}),
    "grouped_odd_sizes_and_wide_values": ((1, 40, 1, 2, 60, 100), {}, {}),
    "extreme_decay": ((1, 128, 1, 1, 128, 64), {"decay": "extreme"}, {"qk_norm_eps": 1e-6}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_definition(case):
    shape, hard, options = CASES[case]
    x = rounded(shape, "bfloat16", **hard)
    actual = check(functools.partial(KERNEL, **options), functools.partial(REFERENCE, **options), x)
    assert actual["o"].dtype == "bfloat16"
    assert actual["final_state"].dtype == "float32"


def test_correlated_keys_and_beta_of_zero_and_decay_to_nothing():
    """What the kernels divide by is never zero, and what they forget is never infinite."""
    shape = (1, 96, 1, 1, 64, 64)
    correlated = rounded(shape, "bfloat16", keys="correlated", beta_max=1.0)
    x = rounded(shape, "bfloat16", seed=4)
    at = np.arange(96)
    x["beta"] = jnp.where((at % 5 == 0)[None, :, None], 0.0, x["beta"])
    x["log_decay"] = jnp.where((at % 7 == 0)[None, :, None], -1e4, x["log_decay"])
    check(KERNEL, REFERENCE, jax.tree.map(lambda *rows: jnp.concatenate(rows), correlated, x))


# The kernels subtract what eq. (27) subtracts, but for K = 256; float16 has its norms outside.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 100, 1, 2, 64, 64), "bfloat16"),
        ((1, 70, 1, 1, 128, 64), "bfloat16"),
        ((1, 40, 1, 2, 256, 64), "bfloat16"),
        ((1, 40, 1, 1, 64, 64), "float16"),
    ],
)
@pytest.mark.slow
def test_norms_inside(shape, dtype):
    """Keys and queries of lengths from 0.1 to 30, and an eps that is not small beside all of them."""
    x = rounded(shape, dtype, seed=5)
    rng = np.random.default_rng(6)
    for name in "qk":
        lengths = 10.0 ** rng.uniform(-1, 1.5, size=(*shape[:3], 1))
        x[name] = (x[name].astype("float32") * lengths).astype(dtype)
    options = {"qk_norm_eps": 1e-2}
    check(functools.partial(KERNEL, **options), functools.partial(REFERENCE, **options), x)


def test_float16():
    """As near as bfloat16 ought to be, and nearer: three more bits."""
    x = rounded((1, 70, 1, 2, 64, 128), "float16")
    actual = check(KERNEL, REFERENCE, x, "float16")
    assert actual["o"].dtype == "float16"
    assert actual["dq"].dtype == "float16"


def test_gates_norm_documents_and_padding_inside():
    """Gates made inside, documents that begin inside a chunk and at its edge, padding of NaN, no initial state."""
    x, poisoned, segment_ids = (jax.tree.map(jnp.asarray, y) for y in documents())
    half = {name: y.astype(jnp.bfloat16) if name in "qkv" else y for name, y in poisoned.items()}
    x = {name: y.astype(jnp.bfloat16) if name in "qkv" else y for name, y in x.items()}
    op = functools.partial(
        gated_delta_rule_from_gates, segment_ids=segment_ids, qk_norm_eps=1e-6, beta_max=2.0
    )
    actual = interpreted(functools.partial(op, implementation="mosaic_gpu"), half)
    wanted = defined(functools.partial(op, implementation="reference"), x)
    for name, value in actual.items():
        assert_near(name, value, wanted[name], "bfloat16")


@pytest.mark.parametrize(
    ("shape", "programs"),
    [
        ((1, 192, 1, 1, 64, 256), 1),
        ((1, 192, 1, 1, 128, 128), 1),
        ((1, 192, 1, 1, 256, 128), 1),
        ((1, 256, 1, 1, 64, 128), 1),
        ((1, 384, 1, 1, 64, 64), 3),
    ],
)
@pytest.mark.slow
def test_several_chunks_a_program(shape, programs, monkeypatch):
    """Every buffer is filled again, and every barrier passes more than once: few programs have all chunks of a head."""
    monkeypatch.setattr(tiling, "gpu_run", lambda chunks, stride, rows: chunks // programs)
    x = rounded(shape, "bfloat16")
    x["log_decay"] = x["log_decay"] * 0.1
    check(KERNEL, REFERENCE, x)


@pytest.mark.parametrize(("shape", "stride"), [((1, 256, 1, 2, 128, 128), 2), ((1, 128, 1, 2, 64, 256), 1)])
@pytest.mark.slow
def test_heads_begin_at_different_chunks(shape, stride, monkeypatch):
    """The second head's gradients begin in the middle of the program's chunks, and end there."""
    monkeypatch.setattr(tiling, "gpu_run", lambda chunks, stride, rows: chunks)
    monkeypatch.setattr(mosaic_gpu_kernel, "state_stride", lambda *sizes: stride)
    assert (3 * stride) % (shape[1] // mosaic_gpu_kernel.CHUNK)
    x = rounded(shape, "bfloat16")
    x["log_decay"] = x["log_decay"] * 0.1
    check(KERNEL, REFERENCE, x)


@pytest.mark.parametrize(
    ("shape", "options", "has_state"),
    [
        ((1, 180, 1, 2, 64, 64), {"qk_norm_eps": 1e-6}, True),
        ((1, 192, 1, 2, 64, 128), {"qk_norm_eps": 1e-6}, False),
        ((1, 192, 1, 1, 256, 64), {}, False),
    ],
)
@pytest.mark.slow
def test_sequences_in_parts(shape, options, has_state, monkeypatch):
    """Three parts of one chunk each, whose states are put together, with slow decay so that all of them count."""
    monkeypatch.setattr(tiling, "gpu_parts", lambda chunks, rows: 3)
    x = rounded(shape, "bfloat16", seed=8)
    x["log_decay"] = x["log_decay"] * 0.1
    if not has_state:
        del x["initial_state"]
    check(functools.partial(KERNEL, **options), functools.partial(REFERENCE, **options), x)


@pytest.mark.parametrize(
    ("shape", "options", "pieces", "forgets", "has_state"),
    [
        ((2, 256, 1, 1, 64, 64), {}, 1, [(0, 1, 2, 3), (0, 2)], True),
        ((2, 256, 1, 1, 64, 64), {}, 2, [(), (1, 3)], True),
        ((1, 256, 1, 1, 128, 128), {}, 1, [(1, 3)], True),
        ((2, 256, 1, 1, 128, 64), {"qk_norm_eps": 1e-6}, 2, [(), (0, 2)], False),
        ((1, 256, 1, 1, 256, 64), {}, 2, [()], True),
        ((1, 512, 1, 1, 64, 64), {}, 2, [(1, 6)], True),
    ],
)
@pytest.mark.slow
def test_parts_skip_what_is_forgotten(shape, options, pieces, forgets, has_state, monkeypatch):
    """Two parts, whole or in pieces; some chunks of each sequence forget. What nobody asks for is NaN."""
    monkeypatch.setattr(tiling, "gpu_parts", lambda chunks, rows: 2)
    monkeypatch.setattr(tiling, "gpu_pieces", lambda chunks, finer: pieces)
    x = rounded(shape, "bfloat16", seed=8)
    log_decay = np.array(x["log_decay"]) * np.float32(0.1)
    for row, chunks in zip(log_decay, forgets, strict=True):
        row[[chunk * 64 + 13 for chunk in chunks]] = -1e3
    x["log_decay"] = jnp.asarray(log_decay)
    if not has_state:
        del x["initial_state"]
    check(functools.partial(KERNEL, **options), functools.partial(REFERENCE, **options), x)


def test_pieces_are_of_equal_length_and_not_short():
    sizes = {1: 1, 32: 1, 63: 1, 64: 2, 99: 3, 127: 1, 128: 4, 256: 8, 1024: 8}
    assert {chunks: tiling.gpu_pieces(chunks, finer=False) for chunks in sizes} == sizes
    assert {chunks: tiling.gpu_pieces(chunks, finer=True) for chunks in (31, 32, 64, 256)} == {
        31: 1,
        32: 2,
        64: 4,
        256: 8,
    }


def sharded(**x):
    """A batch of calls inside a shard_map, its checks on."""

    def one(x):
        return jax.tree.map(
            lambda y: y[0], KERNEL(**{name: y[None] for name, y in x.items()}, return_final_state=True)
        )

    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    data = PartitionSpec("data")
    return jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=data, out_specs=data)(x)


@pytest.mark.slow
def test_parts_under_vmap_and_shard_map(monkeypatch):
    """Two sequences at once are programs enough, so that they are not cut; one is. What is saved must fit both."""
    monkeypatch.setattr(tiling, "gpu_parts", lambda chunks, rows: 2 if rows == 1 else 1)
    x = rounded((2, 100, 1, 1, 64, 64), "bfloat16", seed=9)

    def both(x):
        return forward_and_gradients(KERNEL, {name: y[None] for name, y in x.items()})

    with plgpu.force_gpu_interpret_mode(STRICT):
        mapped = jax.jit(jax.vmap(both))(x)
    once = interpreted(KERNEL, x)
    # Each was given the same cotangents, those of the first sequence of two.
    for name in ("o", "final_state"):
        np.testing.assert_array_equal(mapped[name][:, 0], once[name], name)
    wanted = [defined(REFERENCE, {name: y[i : i + 1] for name, y in x.items()}) for i in range(2)]
    for name, value in mapped.items():
        assert_near(name, value, np.stack([w[name] for w in wanted]), "bfloat16")
    composed = interpreted(lambda return_final_state, **x: sharded(**x), x)
    for name, value in once.items():
        np.testing.assert_array_equal(composed[name], value, name)


@pytest.mark.parametrize(
    ("chunks", "rows", "parts"),
    [
        (256, 32, 4),
        (1024, 32, 4),
        (64, 128, 1),
        (64, 32, 4),
        (128, 64, 2),
        (8, 2, 1),
        (256, 12, 8),
        (157, 2, 1),
        (99, 8, 9),
    ],
)
def test_parts_fill_the_multiprocessors(chunks, rows, parts):
    assert tiling.gpu_parts(chunks, rows) == parts


def test_a_planted_race_is_found(monkeypatch, capfd):
    """Were nothing ordered before the copy engine reads it, what the threads write would be on its way."""
    monkeypatch.setattr(mosaic_gpu_kernel.plgpu, "commit_smem", lambda: None)
    x = rounded((1, 64, 1, 1, 64, 64), "bfloat16")
    with plgpu.force_gpu_interpret_mode(STRICT):
        try:
            jax.block_until_ready(KERNEL(**x, return_final_state=True))
            found = capfd.readouterr().out
        except jax.errors.JaxRuntimeError as error:
            found = str(error)
    assert "RACE DETECTED" in found.upper()


@pytest.mark.slow
def test_parts_compose_with_shard_map(monkeypatch):
    """A call of a sequence that is cut, inside a shard_map, equals one outside it."""
    monkeypatch.setattr(tiling, "gpu_parts", lambda chunks, rows: 2)
    x = rounded((1, 128, 1, 1, 64, 64), "bfloat16", seed=7)
    composed = interpreted(lambda return_final_state, **x: sharded(**x), x)
    for name, value in interpreted(KERNEL, x).items():
        np.testing.assert_array_equal(composed[name], value, name)


def test_saves_states_inverses_and_gates_only():
    """Beyond its inputs, for each token and value head: a fourth of 2·K·V/C bytes, 2·C, and γ and √β."""
    x = rounded((1, 256, 1, 2, 64, 128), "bfloat16")
    with plgpu.force_gpu_interpret_mode(STRICT):
        _, vjp = jax.eval_shape(functools.partial(jax.vjp, lambda x: KERNEL(**x)[0]), x)
    saved = sum(y.size * y.dtype.itemsize for y in jax.tree.leaves(vjp))
    inputs = sum(y.size * y.dtype.itemsize for y in x.values())
    assert saved - inputs == 256 * 2 * (64 * 128 // 128 + 2 * 64 + 8)


@pytest.mark.parametrize(
    ("shape", "parts"),
    [((1, 256, 1, 1, 64, 64), 1), ((1, 256, 1, 1, 128, 128), 2), ((1, 128, 1, 1, 256, 64), 2)],
)
def test_lowers_for_a_gpu(shape, parts, monkeypatch):
    """What the interpreter does not ask: whether this jax finds layouts and transfers for all of every kernel."""
    monkeypatch.setattr(mosaic_gpu, "runs_here", lambda: True)
    monkeypatch.setattr(tiling, "gpu_parts", lambda chunks, rows: parts)
    x = rounded(shape, "bfloat16")
    traced = jax.jit(functools.partial(forward_and_gradients, KERNEL)).trace(x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    names = {"gdn_inverse", "gdn_forward", "gdn_walk", "gdn_gradients"}
    if parts > 1:
        names |= {"gdn_summary", "gdn_firsts", "gdn_local_walk", "gdn_lasts"}
    assert {name for name in names if name in text} == names


@pytest.mark.slow
def test_a_result_that_nobody_differentiates():
    """A loss of o or of the final state alone: bit for bit as with the other in it, times zero."""
    x = rounded((1, 70, 1, 1, 64, 64), "bfloat16", seed=9)

    def losses(x):
        # Squares, so that the cotangent is not the same everywhere.
        return [jnp.sum(jnp.square(y.astype(jnp.float32))) for y in KERNEL(**x, return_final_state=True)]

    def weighted(weights, x):
        return sum(weight * loss for weight, loss in zip(weights, losses(x), strict=True))

    gradients = jax.jit(jax.grad(weighted, argnums=1))
    with plgpu.force_gpu_interpret_mode(STRICT):
        for wanted, weights in enumerate(([1.0, 0.0], [0.0, 1.0])):
            alone = jax.jit(jax.grad(lambda x, wanted=wanted: losses(x)[wanted]))(x)
            with_zero = gradients(weights, x)
            for name, value in alone.items():
                assert np.any(np.asarray(value, np.float32)) or (wanted == 1 and name == "q"), name
                np.testing.assert_array_equal(value, with_zero[name], name)


def test_refuses_by_name():
    x = rounded((1, 8, 1, 2, 64, 64), "bfloat16")
    with pytest.raises(NotImplementedError, match="runs on Hopper GPUs; this is a cpu"):
        KERNEL(**x)
    with plgpu.force_gpu_interpret_mode(STRICT):
        whole = x | {name: x[name].astype("float32") for name in "qkv"}
        with pytest.raises(NotImplementedError, match="all be bfloat16 or all float16; got float32"):
            KERNEL(**whole)
        wide = rounded((1, 8, 1, 1, 300, 64), "bfloat16")
        with pytest.raises(NotImplementedError, match="K must be at most 256; got 300"):
            KERNEL(**wide)
        with pytest.raises(NotImplementedError, match="the kernels invert in float16"):
            KERNEL(**x, inverse_precision="highest")
        # Named implementations never fall back; None does not take an interpreter.
        assert np.isfinite(np.asarray(gated_delta_rule(**x)[0], np.float32)).all()


@pytest.mark.parametrize(
    ("chunks", "stride", "rows"),
    [(64, 8, 64), (256, 8, 16), (64, 1, 24), (7, 1, 3), (1, 1, 1), (8, 8, 1), (1024, 8, 2)],
)
def test_a_program_does_whole_chunks_and_begins_with_a_saved_state(chunks, stride, rows):
    run = tiling.gpu_run(chunks, stride, rows)
    assert chunks % run == 0
    assert run % stride == 0
    # No multiprocessor is left without work that another still has twice.
    assert run == stride or chunks // run * rows >= 66
