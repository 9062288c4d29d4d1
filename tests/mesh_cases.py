"""Runs as a process of its own with eight emulated devices: one small run per mesh, and what its programs exchange.

``python mesh_cases.py FOLDER STEPS MESH...`` prints JSON: mesh -> losses, exchanges and what was not planned.
"""

import json
import math
import pathlib
import re
import sys

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import tiny

from gdn_jax.mup.spec import ParamSpec
from train import collectives, loop
from train import mesh as meshes
from train.config import ModelOptions
from train.data import prepare, train_batch
from train.step import Program, compile_program

assert conftest, "its settings hold here as well"

# Eight heads at width 64; 264 ids, since the 257 of bytes would stay whole.
# At 0.005 one rounding of the initial parameters makes 2e-3 of the loss after 50 steps on one device, through Adam's
# division by small gradients; at 0.001 it makes 1e-6, so what a mesh changes is seen.
RATE = 0.001
MODEL = ModelOptions(layers=2, key_dim=4, value_dim=8, base_width=16)


def parse(text):
    """ "data=2,fsdp=4" as a mesh."""
    pairs = [pair.split("=") for pair in text.split(",") if pair]
    return meshes.MeshShape(**{name: int(size) for name, size in pairs})


def largest_array(compiled_text):
    """Elements of the largest array that a program makes on one device."""
    shapes = re.findall(r"\b(?:f32|u32|s32|u64)\[([\d,]+)\]", compiled_text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def run(program, shape, batches):
    mesh = meshes.build_mesh(shape, jax.devices()[: shape.devices])
    packed = shape.sweep > 1
    compiled = compile_program(program, mesh, packed=packed)
    points = [(RATE / 2**index, "mup", index) for index in range(shape.sweep)]
    hparams = [program.hparams(rate, preset) for rate, preset, _ in points]
    if packed:
        hparams, seeds = loop.stack_hparams(hparams), loop.as_seeds([seed for *_, seed in points])
    else:
        hparams, seeds = hparams[0], jnp.int32(0)
    init = compiled.init.lower(seeds, hparams).compile()
    state = init(seeds, hparams)
    gate = state.params["layers"]["mlp"]["gate"]["kernel"]
    step = compiled.step.lower(state, meshes.put_batch(mesh, batches[0]), hparams).compile()
    losses = []
    loop.run(
        compiled._replace(step=step),
        state,
        hparams,
        batches,
        first_step=0,
        last_step=len(batches),
        observe=lambda _, metrics: losses.append(np.asarray(metrics.loss).tolist()),
    )
    found = collectives.exchanges(step.as_text(), shape.sizes)
    return {
        "losses": losses,
        "exchanges": sorted({f"{x.kind} {'+'.join(x.axes)}" for x in found}),
        "unplanned": [collectives.say(x) for x in collectives.unplanned(found, program.specs, shape.sizes)],
        "parts": gate.size // math.prod(gate.sharding.shard_shape(gate.shape)),
        "largest_in_init": largest_array(init.as_text()),
    }


def main(folder, steps, *names):
    # Of 8 devices along a sequence each has more than a convolution looks back.
    config = tiny.data_config(pathlib.Path(folder), sequence_length=32)
    data = prepare(config)
    batches = [train_batch(data, config, step) for step in range(int(steps))]
    program = Program(MODEL.gdn_config(64, 264), tiny.OPTIMIZER, int(steps))
    whole = max(
        math.prod(spec.sizes)
        for spec in jax.tree.leaves(program.specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    )
    results = {name: run(program, parse(name), batches) for name in names}
    print(json.dumps({"whole": whole, "results": results}))


if __name__ == "__main__":
    main(*sys.argv[1:])
