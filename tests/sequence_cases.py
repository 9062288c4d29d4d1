"""What `test_sequence_split.py` measures in a process of eight devices: each case against one device.

A case returns RMS(error) / RMS(expected) by the name of what it compares.
"""

import functools
import json
import math
import re
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from kernel_operands import cast, forward_and_gradients, operands

from gdn_jax.config import GDNConfig
from gdn_jax.mixer import GatedDeltaNet
from kernels_pallas import gated_delta_rule, gated_delta_rule_from_gates

IMPLEMENTATIONS = ("chunked", "reference")
# B, T, H, G, K, V: grouped heads, K ≠ V, a length that 2, 4 and 8 divide.
SHAPE = (4, 64, 1, 2, 8, 12)
AXIS = "sequence"
# Borders of devices are the multiples of 8 (of 16, of 32 for fewer devices).
DOCUMENTS = np.asarray(
    [
        # Borders of documents inside a part and at its edge; across an edge; one that goes on after padding across an
        # edge; padding that begins a part, and another document after it.
        [1] * 5 + [2] * 3 + [3] * 12 + [4] * 10 + [0] * 4 + [4] * 6 + [5] * 8 + [0] * 3 + [6] * 13,
        # Parts of nothing but padding: before tokens of the same document, and before another one.
        [7] * 14 + [0] * 18 + [7] * 6 + [0] * 18 + [9] * 8,
        # Padding first: the initial state belongs to the document that begins on a later device. Padding last: the
        # final state passes through it.
        [0] * 16 + [1] * 16 + [2] * 16 + [0] * 16,
        # One document over all devices.
        [1] * 64,
    ]
)  # fmt: skip


def split(function, devices, x, *, axis=AXIS, data=1, **options):
    """`function(x)` of the parts of `x`, as `shard_map` runs it; o split like its operands, states on all."""
    mesh = jax.make_mesh(
        (data, devices),
        ("data", AXIS),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[: data * devices],
    )
    whole = {"initial_state": P("data"), "A_log": P(), "dt_bias": P(), "scale": P()}
    specs = {name: whole.get(name, P("data", AXIS)) for name in x}
    return jax.shard_map(
        functools.partial(function, sequence_axis=axis),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(P("data", AXIS), P("data")),
        **options,
    )(x)


def run_op(x, op=gated_delta_rule, **options):
    return op(**x, return_final_state=True, **options)


def program(run, x, ids=None):
    """Compiled o, final state and gradients; the ids are an operand that nobody differentiates."""
    extra = {} if ids is None else {"segment_ids": ids}

    def whole(x, extra):
        return forward_and_gradients(lambda return_final_state, **y: run(y | extra), x)

    return jax.jit(whole).lower(x, extra).compile(), (x, extra)


def results(run, x, ids=None):
    compiled, arguments = program(run, x, ids)
    return compiled(*arguments)


def errors(actual, expected):
    """RMS(error) / RMS(expected) of each entry."""
    measured = {}
    for name, value in expected.items():
        a, b = (np.asarray(y, np.float64) for y in (actual[name], value))
        assert a.shape == b.shape, name
        measured[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return measured


def poisoned(x, ids):
    """NaN in all that padding holds."""
    return {
        name: y
        if name in ("initial_state", "A_log", "dt_bias")
        else jnp.where(jnp.expand_dims(ids == 0, range(2, y.ndim)), jnp.nan, y)
        for name, y in x.items()
    }


@functools.cache
def op_operands(dtype, length, documents):
    """Operands in `dtype` and, by the definition in float64 on one device, what must come out."""
    batch, _, *heads = SHAPE
    x = cast(operands(batch, length, *heads, keys="correlated"), dtype)
    x["initial_state"] = x["initial_state"].astype("float32" if dtype == "bfloat16" else dtype)
    ids = jnp.asarray(np.tile(DOCUMENTS, (1, length // 64)), jnp.int32) if documents else None
    if ids is not None:
        x = poisoned(x, ids)
    one = functools.partial(run_op, implementation="reference")
    return x, ids, results(one, cast(x, "float64"), ids)


@functools.cache
def op_program(devices, implementation, dtype, length, documents, check_vma=True):
    x, ids, _ = op_operands(dtype, length, documents)
    run = functools.partial(run_op, implementation=implementation)
    return program(lambda y: split(run, devices, y, check_vma=check_vma), x, ids)


def op_case(devices, implementation="chunked", dtype="float32", length=64, documents=False, check_vma=True):
    compiled, arguments = op_program(devices, implementation, dtype, length, documents, check_vma)
    actual = compiled(*arguments)
    measured = errors(actual, op_operands(dtype, length, documents)[2])
    if documents:
        padding = DOCUMENTS == 0
        per_token = [y for name, y in actual.items() if name not in ("final_state", "dinitial_state")]
        measured["padding"] = max(float(np.abs(np.asarray(y, np.float64)[padding]).max()) for y in per_token)
    return measured


def interpreted_case(devices):
    """The TPU kernels, whose values are wider here by the columns that read what enters a part."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        return op_case(devices, "mosaic_tpu", documents=True)


def op_forward(documents=False, axis=AXIS):
    """Without gradients, for the faults."""
    x, ids, expected = op_operands("float32", 64, documents)
    x = x | ({} if ids is None else {"segment_ids": ids})
    run = functools.partial(run_op, implementation="reference")
    # Unchecked: without an exchange, the final states of the devices differ.
    o, _ = jax.jit(lambda y: split(run, 4, y, axis=axis, check_vma=False))(x)
    return errors({"o": o}, {"o": expected["o"]})


def gates_case():
    """Gates, norm, scale and documents at once, batch and sequence split, under checkpoint and vmap."""
    x, ids, _ = op_operands("float32", 64, True)
    rng = np.random.default_rng(5)
    x = dict(x)
    x["a"], x["b"] = x.pop("log_decay"), 4 * x.pop("beta") - 4
    x["A_log"], x["dt_bias"] = cast(list(rng.normal(size=(2, SHAPE[3]))), "float32")
    run = functools.partial(run_op, op=gated_delta_rule_from_gates, beta_max=2.0, qk_norm_eps=1e-6, scale=0.7)
    expected = results(functools.partial(run, implementation="reference"), cast(x, "float64"), ids)

    def parts(y, sequence_axis):
        point = jax.checkpoint(functools.partial(run, sequence_axis=sequence_axis))
        return jax.tree.map(lambda z: z[0], jax.vmap(point)(jax.tree.map(lambda z: z[None], y)))

    return errors(results(lambda y: split(parts, 4, y, data=2), x, ids), expected)


def make_mixer(conv_size=4):
    config = GDNConfig(
        width=16,
        num_key_heads=1,
        num_value_heads=2,
        key_dim=8,
        value_dim=12,
        mlp_width=16,
        conv_size=conv_size,
        # Compiles in less time; the op's own cases show that all agree.
        implementation="reference",
    )
    return GatedDeltaNet(config, rngs=nnx.Rngs(0))


@functools.cache
def mixer_parts(conv_size=4):
    return nnx.split(nnx.jit(functools.partial(make_mixer, conv_size))())


def mixer_inputs(length=64):
    """The mixer's input and the weight of each output in the loss."""
    return cast(list(np.random.default_rng(0).normal(size=(2, 4, length, 16))), "float32")


def mixer_split(devices, graph, **options):
    """(parameters, x, ids) → the mixer's output: of a part, and of the parts; and the `shard_map` between them."""
    part = P(None, AXIS)

    def mixed(parameters, x, ids):
        return nnx.merge(graph, parameters)(x, segment_ids=ids, **options)

    def over(function, in_specs, out_specs):
        mesh = jax.make_mesh(
            (devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
        )
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)

    return mixed, over(mixed, (P(), part, part), part), over


@functools.cache
def mixer_program(devices, *, inside=False, length=64):
    """The mixer's output and parameter gradients; `inside`: differentiated within `shard_map`."""
    graph, parameters = mixer_parts()
    x, weight = mixer_inputs(length)
    ids = jnp.asarray(np.tile(DOCUMENTS, (1, length // 64)), jnp.int32)
    # What the mixer puts out at padding is nobody's business.
    weight = jnp.where((ids == 0)[..., None], 0, weight)
    mixed, sharded, over = mixer_split(devices, graph, sequence_axis=AXIS if devices > 1 else None)

    def loss(run, parameters, x, ids, weight):
        y = run(parameters, x, ids)
        total = jnp.sum(y * weight)
        return (jax.lax.psum(total, AXIS) if inside else total), y * (weight != 0)

    differentiated = jax.value_and_grad(
        functools.partial(loss, sharded if devices > 1 and not inside else mixed), has_aux=True
    )
    if inside:
        part = P(None, AXIS)
        differentiated = over(differentiated, (P(), part, part, part), ((P(), part), P()))
    arguments = parameters, x, ids, weight
    return jax.jit(differentiated).lower(*arguments).compile(), arguments


def mixer_case(inside=False):
    both = []
    for compiled, arguments in (mixer_program(1), mixer_program(4, inside=inside)):
        (_, y), gradients = compiled(*arguments)
        leaves = jax.tree.leaves_with_path(gradients)
        # As `dA_log` and `dconv_q.kernel`.
        both.append(
            {"y": y} | {"d" + jax.tree_util.keystr(p[:-1], simple=True, separator="."): g for p, g in leaves}
        )
    return errors(both[1], both[0])


def mixer_forward(documents=False, conv_size=4):
    """Without gradients, for the faults and for a mixer without a halo."""
    graph, parameters = mixer_parts(conv_size)
    x, _ = mixer_inputs()
    ids = jnp.asarray(DOCUMENTS, jnp.int32) if documents else None
    one, _, _ = mixer_split(1, graph)
    _, four, _ = mixer_split(4, graph, sequence_axis=AXIS)
    kept = (DOCUMENTS != 0 if documents else np.ones((4, 64)))[..., None]
    wanted, actual = (kept * jax.jit(run)(parameters, x, ids) for run in (one, four))
    return errors({"y": actual}, {"y": wanted})


_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-\w+|ragged-all-to-all)(?:-start)?\("
)


def collectives(compiled):
    """(operation, dtype, elements) of every array that a compiled program exchanges."""
    found = []
    for shapes, operation in _COLLECTIVE.findall(compiled.as_text()):
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            found.append((operation, dtype, math.prod(int(n) for n in sizes.split(",") if n)))
    return sorted(found)


def gathering_program():
    """The fault that the test of the traffic must find: keys of the whole sequence on every device."""
    x, _, _ = op_operands("float32", 64, False)

    def run(y, sequence_axis):
        k = jax.lax.all_gather(y["k"], AXIS, axis=1, tiled=True)
        y = y | {"k": y["k"] + jnp.mean(k, axis=1, keepdims=True)}
        return run_op(y, sequence_axis=sequence_axis, implementation="reference")

    return jax.jit(lambda y: split(run, 4, y)).lower(x).compile()


def traffic_case():
    """By program: what one sequence and one of twice the length exchange."""
    return {
        "op": [collectives(op_program(4, "chunked", "float32", n, True)[0]) for n in (64, 128)],
        "mixer": [collectives(mixer_program(4, inside=True, length=n)[0]) for n in (64, 128)],
        "gathering": [collectives(gathering_program())],
        # The program of the case above; it is compiled already.
        "kernels": [collectives(op_program(4, "mosaic_tpu", "float32", 64, True, True)[0])],
    }


OP_CASES = (
    {
        f"{implementation} documents {devices}": (
            "float32",
            functools.partial(op_case, devices, implementation, documents=True),
        )
        for implementation in IMPLEMENTATIONS
        for devices in (2, 4, 8)
    }
    | {
        "one device": ("float32", functools.partial(op_case, 1, "reference")),
        "chunked 8": ("float32", functools.partial(op_case, 8)),
        # No power of two, and to the last digits.
        "float64 5": ("float64", functools.partial(op_case, 5, dtype="float64", length=40)),
        "bfloat16 8": ("bfloat16", functools.partial(op_case, 8, dtype="bfloat16")),
        "unchecked 4": (
            "float32",
            functools.partial(op_case, 4, "reference", documents=True, check_vma=False),
        ),
        "gates": ("float32", gates_case),
    }
    | {
        f"mosaic_tpu documents {devices}": ("float32", functools.partial(interpreted_case, devices))
        for devices in (2, 4, 8)
    }
)
MIXER_CASES = {
    "mixer": mixer_case,
    "mixer differentiated inside": functools.partial(mixer_case, inside=True),
}


def without(cut, case):
    """`case` where each device hears nothing of the others by the exchange `cut`."""
    module, name, deaf = {
        "states": (
            "kernels_pallas.gated_delta_rule.sequence",
            "_entering_state",
            lambda local, transition, axis: 0 * local,
        ),
        "ids": (
            "kernels_pallas.gated_delta_rule.choice",
            "last_id_before",
            lambda ids, axis: 0 * ids[:, 0],
        ),
        "halo": ("gdn_jax.layers", "left_halo", lambda x, taps, axis: 0 * x[:, :taps]),
    }[cut]

    def run():
        with pytest.MonkeyPatch.context() as patch:
            # By name: the op `gated_delta_rule` hides its folder as an attribute of the package.
            patch.setattr(sys.modules[module], name, deaf)
            return case()

    return run


FAULTS = {
    "parts alone": functools.partial(op_forward, axis=None),
    "no states": without("states", op_forward),
    "no ids": without("ids", functools.partial(op_forward, documents=True)),
    "no halo": without("halo", mixer_forward),
    "no halo's ids": without("halo", functools.partial(mixer_forward, documents=True)),
}
FORWARD_CASES = {
    # The same without a fault: it is the cut that the tests below find.
    "op forward": functools.partial(op_forward, documents=True),
    "mixer forward": mixer_forward,
    "mixer without taps": functools.partial(mixer_forward, conv_size=1),
}
CASES = (
    {name: case for name, (_, case) in OP_CASES.items()}
    | MIXER_CASES
    | FORWARD_CASES
    | FAULTS
    | {"traffic": traffic_case}
)


def print_results():
    """Measure every case; needs eight devices."""
    assert jax.device_count() == 8
    measured = {}
    for name, case in CASES.items():
        try:
            # For the definition in float64; every operand brings its own dtype.
            with jax.enable_x64(True):
                measured[name] = case()
        except Exception:
            measured[name] = traceback.format_exc()
    print(json.dumps(measured))
