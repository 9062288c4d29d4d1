"""`gdn compile`: the train step compiled for a TPU pod that is not there, and whether it fits.

The TPU compiler runs on any Linux machine (see ``kernels_pallas.gated_delta_rule.tpu_compiler``), in a process of
its own. What it says of memory is what a pod would do; figures are of one device, which on v4 and tpu7x is half a
chip.
"""

import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gdn_jax.config import GDNConfig
from kernels_pallas.gated_delta_rule import tpu_compiler
from train import collectives
from train import mesh as meshes
from train.config import ModelOptions, OptimizerOptions
from train.flops import train_flops_per_token
from train.mesh import MeshOptions, MeshShape

type ModelName = Literal["1.3b", "7b", "30b"]

GIB = 2**30
# GiB of HBM that a program may use on one device, as the compiler of libtpu 0.0.50 names it when it refuses one.
HBM = {"v4": 15.25, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24, "tpu7x": 94.74}
# The compiler's devices are TensorCores here; elsewhere the cores of a chip work as one.
_DEVICES_PER_CHIP = {"v4": 2, "tpu7x": 2}

# Heads of 128 as the kernels like them, two value heads a key head as Qwen3-Next has, and an MLP that holds half
# of the parameters. Width 256 is the base: only sizes matter to a compiler.
_BASE = GDNConfig(
    width=256,
    num_key_heads=2,
    num_value_heads=4,
    key_dim=128,
    value_dim=128,
    mlp_width=704,
    vocab_size=32768,
    compute_dtype="bfloat16",
    remat="block",
)
# Devices along fsdp where no mesh is given: each then stores 128 columns of a matrix, a TPU's lanes. With fewer, the
# compiler sums gradients whole instead of in parts, twice the traffic.
_FSDP = {"1.3b": 16, "7b": 32, "30b": 64}
MODELS: dict[str, GDNConfig] = {
    "1.3b": dataclasses.replace(_BASE, num_layers=18).widen(2048, "heads"),
    "7b": dataclasses.replace(_BASE, num_layers=25).widen(4096, "heads"),
    "30b": dataclasses.replace(_BASE, num_layers=27).widen(8192, "heads"),
}


@dataclasses.dataclass(frozen=True)
class CompileOptions:
    """What is compiled, and for which pod."""

    topology: str
    """TPU generation and torus: v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4."""
    size: ModelName | None = None
    """A model of that many parameters, in bfloat16, each block rematerialised. Where no mesh is given, fsdp is as
    large as leaves each device 128 columns of a matrix, and data takes the rest."""
    width: int | None = None
    """Instead of --size: --model at this width, with 257 tokens."""
    batch_size: int | None = None
    """Sequences a step; by default one for each device along data and fsdp."""
    sequence_length: int = 4096
    """Tokens of a sequence."""
    json: bool = False
    """Print the report as JSON."""

    def __post_init__(self) -> None:
        if (self.size is None) == (self.width is None):
            raise ValueError("gdn compile needs --size or --width, and not both. Use --size 7b, for example.")
        for name in ("width", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be positive; got {value}.")
        if self.sequence_length < 2:
            raise ValueError(f"--sequence-length must be at least 2; got {self.sequence_length}.")


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to compile."""

    topology: str
    config: GDNConfig
    shape: MeshShape
    batch_size: int
    sequence_length: int


def plan(options: CompileOptions, model: ModelOptions, mesh: MeshOptions) -> Job:
    """The job of a command line.

    Raises:
        ValueError: an unknown topology, or a mesh that does not fit the model; the message names what does.
    """
    topology = tpu_compiler.topology_name(options.topology)
    generation, torus = topology.split(":")
    devices = math.prod(map(int, torus.split("x"))) * _DEVICES_PER_CHIP.get(generation, 1)
    if options.size is not None:
        config = MODELS[options.size]
        if mesh == MeshOptions():
            mesh = MeshOptions(fsdp=min(_FSDP[options.size], devices))
    else:
        assert options.width is not None, "checked on construction"
        config = model.gdn_config(options.width, 257)
    if options.batch_size is None:
        parts = max(1, devices // (mesh.sequence * mesh.tensor))
        batch_size = parts if mesh.data is None else mesh.data * mesh.fsdp
    else:
        batch_size = options.batch_size
    shape = meshes.choose_mesh(mesh, devices, config, batch_size, options.sequence_length)
    return Job(topology, config, shape, batch_size, options.sequence_length)


def compile_job(job: Job) -> dict[str, Any]:
    """Compiles in a process of its own.

    Returns:
        What `gdn compile --json` prints: ``fits``, ``short_by_gib`` (None if it fits), ``memory_gib``, ``hbm_gib``,
        ``exchanges``, ``unplanned``, ``compile_seconds``, ``flops_per_step`` and the job itself.

    Raises:
        ValueError: there is no TPU compiler here.
        RuntimeError: the compiler failed for another reason than memory.
    """
    config = dataclasses.asdict(job.config)
    words = json.dumps(dataclasses.asdict(job) | {"config": config})
    try:
        compiled = tpu_compiler.run_worker(["-m", "train.aot", words], None)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    hbm = HBM[job.topology.split(":")[0]]
    used = compiled["used_gib"]
    tokens = job.batch_size * job.sequence_length
    short = max(used - compiled.get("hbm_gib", hbm), 0.0)
    fits = compiled["refused"] is None and short == 0.0
    return {
        "topology": job.topology,
        "devices": job.shape.devices,
        "mesh": job.shape.sizes,
        "tokens_per_step": tokens,
        "flops_per_step": tokens * train_flops_per_token(job.config),
        "hbm_gib": hbm,
        "fits": fits,
        "short_by_gib": None if fits else round(short, 2),
        **compiled,
    }


def _from_json(text: str) -> Job:
    values = json.loads(text)

    def config(fields: dict[str, Any]) -> GDNConfig:
        values: dict[str, Any] = fields | {"base": config(fields["base"]) if fields["base"] else None}
        return GDNConfig(**values)

    return Job(**values | {"config": config(values["config"]), "shape": MeshShape(**values["shape"])})


def _work(job: Job) -> dict[str, Any]:
    """In the process that may compile for TPUs."""
    # Imported here: the step is of no use to the process that prints.
    from train.data import Batch
    from train.step import Program, compile_program

    mesh = meshes.build_mesh(job.shape, tpu_compiler.devices(job.topology))
    program = Program(job.config, OptimizerOptions(), steps=1000)
    hparams = program.hparams(1e-2, "mup")
    placed = meshes.batch_sharding(mesh)
    shape = (job.batch_size, job.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placed)
    mask = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)
    jitted = compile_program(program, mesh, packed=False)
    state = meshes.abstract(jax.eval_shape(program.init, np.int32(0), hparams), program.state_sharding(mesh))
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    start = time.perf_counter()
    # With the mesh in context Pallas sees what is compiled for.
    with jax.set_mesh(mesh):
        lowered = jitted.step.lower(state, Batch._make((tokens, tokens, tokens, mask)), hparams)
    report: dict[str, Any] = {"parameters": parameters, "refused": None}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return report | _refusal(str(error)) | {"compile_seconds": round(time.perf_counter() - start, 1)}
    memory = compiled.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    found = collectives.exchanges(compiled.as_text(), job.shape.sizes)
    return report | {
        "compile_seconds": round(time.perf_counter() - start, 1),
        # The parts do not lie in memory all at once: this is what the compiler holds against the HBM.
        "used_gib": round(memory.peak_memory_in_bytes / GIB, 3),
        "memory_gib": {name: round(size / GIB, 3) for name, size in parts.items()},
        "exchanges": collectives.totals(found),
        "unplanned": [
            collectives.say(x) for x in collectives.unplanned(found, program.specs, job.shape.sizes)
        ],
    }


_SIZE = r"\(?(\d+(?:\.\d+)?)([KMGT]?)\)?"
# "the total memory required for HLO temporaries (2.00T) exceeds available HBM (95.73G)", and in older words "Used
# 24.08G of 15.75G hbm".
_TOO_LARGE = (
    re.compile(rf"required for [\w ]+ {_SIZE} exceeds available HBM {_SIZE}"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)
_UNITS = {"": 1 / GIB, "K": 1 / 2**20, "M": 1 / 2**10, "G": 1.0, "T": 1024.0}


def _refusal(message: str) -> dict[str, Any]:
    """What the compiler says of a program that is too large; raises what it says of anything else."""
    for pattern in _TOO_LARGE:
        if match := pattern.search(message):
            used, unit, available, its_unit = match.groups()
            return {
                "refused": " ".join(match[0].split()),
                "used_gib": float(used) * _UNITS[unit],
                "hbm_gib": float(available) * _UNITS[its_unit],
                "memory_gib": {},
                "exchanges": [],
                "unplanned": [],
            }
    raise RuntimeError(message)


def describe(report: dict[str, Any]) -> list[str]:
    """The report as lines for a reader."""
    sizes = ", ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1) or "one device"
    verdict = (
        f"fits: {report['used_gib']:.2f} of {report['hbm_gib']:.2f} GiB of HBM on each device"
        if report["fits"]
        else f"does not fit: {report['used_gib']:.2f} GiB on each device, {report['short_by_gib']:.2f} GiB more than "
        f"the {report['hbm_gib']:.2f} GiB of HBM there are"
    )
    lines = [
        f"{report['parameters'] / 1e9:.2f} B parameters on {report['topology']} ({report['devices']} devices): {sizes}",
        f"{report['tokens_per_step']:,} tokens and {report['flops_per_step'] / 1e15:,.2f} PFLOP a step, "
        f"{report['flops_per_step'] / report['devices'] / 1e12:,.2f} TFLOP on each device",
        f"compiled in {report['compile_seconds']:.0f} s",
    ]
    if report["memory_gib"]:
        parts = ", ".join(f"{name} {size:.2f}" for name, size in report["memory_gib"].items())
        lines.append(f"memory in GiB: {parts}")
    for row in report["exchanges"]:
        axes = "+".join(row["axes"])
        lines.append(f"{row['kind']} along {axes}: {row['calls']} calls, {row['bytes'] / 1e6:,.1f} MB a step")
    lines += [f"outside the plan: {text}" for text in report["unplanned"]]
    return [*lines, verdict]


def main(arguments: Sequence[str]) -> None:
    """The worker: a job as JSON in, what it found as JSON out."""
    print(json.dumps(_work(_from_json(arguments[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
