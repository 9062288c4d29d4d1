"""Runs as a process of its own, with the TPU compiler's environment: the op, the mixer and the train step on TPUs."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from gdn_jax import GDNConfig
from gdn_jax.mixer import GatedDeltaNet
from kernels_pallas import gated_delta_rule
from kernels_pallas.gated_delta_rule import tpu_compiler
from kernels_pallas.gated_delta_rule.bundles import profile_pass
from kernels_pallas.gated_delta_rule.shapes import SHAPES, Shape
from train import mesh as meshes
from train.config import OptimizerOptions
from train.step import Batch, Program, compile_program

# One group of eight heads; a chip's two cores have one each where there are two.
BUDGET_SHAPE = Shape(1, 4096, 16, 16, 128, 128)


def op(topology, *cases):
    """Bundles per token-head, slots and VMEM of each "pass K V dtype"."""
    results = []
    for case in cases:
        which, key_dim, value_dim, dtype = case.split(":")
        shape = BUDGET_SHAPE._replace(key_dim=int(key_dim), value_dim=int(value_dim))
        profile = profile_pass(topology, shape, dtype, "mosaic_tpu", which)
        (kernel,) = [launch for launch in profile.launches if launch.kind == "kernel"]
        results.append(
            {
                "bundles": kernel.bundles / (shape.batch * shape.length * shape.value_heads),
                "fills": kernel.utilization("VLOAD:FILL"),
                "spills": kernel.utilization("VSTORE:SPILL"),
                "vmem": kernel.vmem_bytes,
            }
        )
    return results


def shapes(topology, *names):
    """Compiles forward and backward at named shapes."""
    for name in names:
        for which in ("forward", "backward"):
            profile_pass(topology, SHAPES[name], "bfloat16", "mosaic_tpu", which)
    return list(names)


def alone(topology, dim):
    """What XLA moves around the op, of q's bytes and more, when heads and channels come in one axis."""
    batch, length, _, heads, *_ = BUDGET_SHAPE
    key_dim = value_dim = int(dim)
    key = jax.ShapeDtypeStruct((batch, length, heads * key_dim), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct((batch, length, heads), jnp.float32)

    def rule(q, k, v, log_decay, beta):
        q, k, v = (x.reshape(batch, length, heads, -1) for x in (q, k, v))
        o, _ = gated_delta_rule(q, k, v, log_decay, beta, implementation="mosaic_tpu")
        return o.reshape(batch, length, -1)

    def gradients(*x):
        o, vjp = jax.vjp(rule, *x[:-1])
        return o, vjp(x[-1])

    operands = (key, key, jax.ShapeDtypeStruct((batch, length, heads * value_dim), jnp.bfloat16), gate, gate)
    device = tpu_compiler.devices(topology)[0]
    profile = tpu_compiler.profile(device, gradients, *operands, operands[2], moved_at_least=2 * key.size)
    return [moved.name for moved in profile.moved]


def _config(**options):
    sizes = {"num_key_heads": 4, "num_value_heads": 4, "key_dim": 128, "value_dim": 128, "mlp_width": 1024}
    return GDNConfig(width=512, num_layers=2, vocab_size=512, compute_dtype="bfloat16", **(sizes | options))


def mixer(topology):
    """What XLA moves around the kernels in the mixer, with all gradients, of q's bytes and more."""
    config = _config()
    graphdef, params = nnx.split(nnx.eval_shape(lambda: GatedDeltaNet(config, rngs=jax.random.key(0))))
    x = jax.ShapeDtypeStruct((2, 2048, config.width), jnp.bfloat16)
    segment_ids = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32)

    def gradients(params, x, segment_ids, dy):
        y, vjp = jax.vjp(lambda p, x: nnx.merge(graphdef, p)(x, segment_ids=segment_ids), params, x)
        return y, vjp(dy)

    device = tpu_compiler.devices(topology)[0]
    profile = tpu_compiler.profile(device, gradients, params, x, segment_ids, x, moved_at_least=2 * x.size)
    return {
        "kernels": sorted(
            launch.name.split(".")[0] for launch in profile.launches if launch.kind == "kernel"
        ),
        "moved": [moved.name for moved in profile.moved],
    }


def step(topology):
    """The data-parallel train step on every chip of a pod: its kernels, and its collectives by kind."""
    devices = tpu_compiler.devices(topology)
    mesh = meshes.build_mesh(meshes.MeshShape(data=len(devices)), devices)
    program = Program(_config(), OptimizerOptions(), steps=10)
    compiled = compile_program(program, mesh, packed=False)
    hparams = program.hparams(0.01, "mup")
    tokens = jax.ShapeDtypeStruct((len(devices), 512), jnp.int32)
    weights = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(compiled.init, np.int32(0), hparams)
        whole = NamedSharding(mesh, PartitionSpec())
        state = jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=whole), state)
        text = compiled.step.lower(state, Batch(tokens, tokens, tokens, weights), hparams).compile().as_text()
    collectives = re.findall(
        r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text
    )
    return {
        "kernels": sorted(set(re.findall(r"%(gated_delta_rule_[a-z]+)[\w.]* = ", text))),
        "collectives": sorted(set(collectives)),
    }


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
