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
from kernels_pallas import gated_delta_rule, gated_delta_step
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


def alone(topology, *names):
    """By named shape the op's kernels, and what XLA moves around them, of q's bytes and more.

    Forward and backward in one program; heads and channels come in one axis, as projections write them.
    """
    device = tpu_compiler.devices(topology)[0]
    results = {}
    for name in names:
        batch, length, key_heads, value_heads, key_dim, value_dim = SHAPES[name]
        key = jax.ShapeDtypeStruct((batch, length, key_heads * key_dim), jnp.bfloat16)
        value = jax.ShapeDtypeStruct((batch, length, value_heads * value_dim), jnp.bfloat16)
        gate = jax.ShapeDtypeStruct((batch, length, value_heads), jnp.float32)

        def gradients(*x, heads=(key_heads, key_heads, value_heads)):
            def rule(*x):
                q, k, v = (y.reshape(*y.shape[:2], n, -1) for y, n in zip(x[:3], heads, strict=True))
                o, _ = gated_delta_rule(q, k, v, *x[3:], implementation="mosaic_tpu")
                return o.reshape(x[2].shape)

            o, vjp = jax.vjp(rule, *x[:-1])
            return o, vjp(x[-1])

        operands = (key, key, value, gate, gate, value)
        profile = tpu_compiler.profile(device, gradients, *operands, moved_at_least=2 * key.size)
        results[name] = _around(profile)
    return results


# Rows and tokens of a loop that decodes.
DECODE = Shape(16, 12, 16, 32, 128, 128)


def decode(topology, *implementations):
    """By implementation: what is launched, copied or fused once a token of a loop of single steps."""
    batch, length, key_heads, value_heads, key_dim, value_dim = DECODE
    key = jax.ShapeDtypeStruct((length, batch, key_heads, key_dim), jnp.bfloat16)
    value = jax.ShapeDtypeStruct((length, batch, value_heads, value_dim), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct((length, batch, value_heads), jnp.float32)
    state = jax.ShapeDtypeStruct((batch, value_heads, key_dim, value_dim), jnp.float32)
    device = tpu_compiler.devices(topology)[0]
    results = {}
    for implementation in implementations:

        def tokens(state, *x, implementation=implementation):
            def token(state, x):
                o, state = gated_delta_step(*x, state, qk_norm_eps=1e-6, implementation=implementation)
                return state, o

            return jax.lax.scan(token, state, x)

        profile = tpu_compiler.profile(
            device, tokens, state, key, key, value, gate, gate, moved_at_least=4 * state.size
        )
        kernels = [launch for launch in profile.launches if launch.kind == "kernel"]
        results[implementation] = {
            "kernels": [launch.name.split(".")[0] for launch in kernels],
            # Per token and value head.
            "bundles": [launch.bundles / (batch * value_heads) for launch in kernels],
            "vmem": max((launch.vmem_bytes for launch in kernels), default=0),
            "moved": [moved.name for moved in profile.moved if moved.calls == length],
            "xla": profile.bundles("xla") / (length * batch * value_heads),
        }
    return results


def _around(profile):
    launches = [launch.name.split(".")[0] for launch in profile.launches if launch.kind == "kernel"]
    return {"kernels": sorted(launches), "moved": [moved.name for moved in profile.moved]}


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
    return _around(profile)


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
