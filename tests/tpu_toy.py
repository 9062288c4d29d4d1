"""Runs as a process of its own, with the TPU compiler's environment: profiles a toy kernel, prints JSON."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.gated_delta_rule import tpu_compiler

# The grid is ROWS x COLUMNS programs of TURNS turns each. The operands are too large for XLA to keep in VMEM,
# so the kernel fetches its windows itself, step by step.
ROWS, COLUMNS, TURNS, OPERATIONS = 2, 3, 5, 200
SIZE = 128
BLOCKS = 2048
# Vector registers of a turn's tile, each of 8 x 128 float32.
REGISTERS = SIZE * SIZE // (8 * 128)


def kernel(x_ref, w_ref, o_ref, sum_ref, *, unroll):
    @pl.when(pl.program_id(1) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def turn(_, carry):
        # Arithmetic enough that the loop is bound by it, unrolled or not; one tanh per register to count.
        y = jnp.dot(x_ref[0], w_ref[0], preferred_element_type=jnp.float32)
        for _ in range(OPERATIONS):
            y = y * y + 0.5
        sum_ref[...] += jnp.tanh(y)
        return carry

    jax.lax.fori_loop(0, TURNS, turn, 0, unroll=unroll)
    o_ref[0] = sum_ref[...].astype(o_ref.dtype)


def toy(x, w, *, unroll):
    block = pl.BlockSpec((1, SIZE, SIZE), lambda i, j: (i * COLUMNS + j, 0, 0))

    def body(*refs):
        kernel(*refs, unroll=unroll)

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(ROWS, COLUMNS),
        in_specs=[block, block],
        out_specs=block,
        scratch_shapes=[pltpu.VMEM((SIZE, SIZE), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="toy",
    )(x, w)


def transposed_toy(x, w):
    return toy(jnp.swapaxes(x, 1, 2), w, unroll=False)


@jax.custom_vjp
def differentiable(x, w):
    return toy(x, w, unroll=False)


def _forward(x, w):
    return differentiable(x, w), (x, w)


def _backward(residuals, do):
    x, w = residuals
    return toy(do, w, unroll=False), x


differentiable.defvjp(_forward, _backward)


def summary(profile):
    kernels = [x for x in profile.launches if x.kind == "kernel"]
    return {
        "names": [x.name for x in kernels],
        "bundles": [x.bundles for x in kernels],
        "static": [x.static_bundles for x in kernels],
        "tanh": [x.filled["EUP"] for x in kernels],
        "cores": [x.cores for x in kernels],
        "busiest_core": [x.busiest_core for x in kernels],
        "vmem": [x.vmem for x in kernels],
        "vmem_bytes": [x.vmem_bytes for x in kernels],
        "assumptions": [y for x in kernels for y in x.assumptions],
        "moved": [list(x) for x in profile.moved],
        "warnings": profile.warnings,
    }


def main(topology, *names):
    device = tpu_compiler.devices(topology)[0]
    x = jax.ShapeDtypeStruct((BLOCKS, SIZE, SIZE), jnp.bfloat16)
    programs = {
        "rolled": (functools.partial(toy, unroll=False), x, x),
        "unrolled": (functools.partial(toy, unroll=True), x, x),
        "transposed": (transposed_toy, x, x),
        "backward": tpu_compiler.backward_of(device, differentiable, x, x),
    }
    profiles = {
        name: tpu_compiler.profile(device, *programs[name], moved_at_least=2 * x.size) for name in names
    }
    print(json.dumps({name: summary(profile) for name, profile in profiles.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
