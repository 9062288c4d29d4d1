"""Compiles for TPUs on a machine that has none, and profiles what comes out.

libtpu holds the whole compiler and runs on any Linux machine with an x86-64 CPU. It reads its flags when it
is loaded, so everything here that compiles runs in a process of its own, with `compiler_environment` set.
"""

import json
import os
import pathlib
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import util
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas.gated_delta_rule import bundle_dumps, hlo_text

# The smallest slice of each generation that the compiler has a description of.
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:1x1",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:1x1",
    "tpu7x": "tpu7x:2x2x1",
}
# Where `make tpu-compiler` puts libtpu: not into .venv, where every command of jax would try to start a TPU.
_CHECKOUT = pathlib.Path(__file__).parents[2]
_DUMP = re.compile(
    r"^\d+-(.+)-\d\d-(final_bundles|pre-finalize-registers-and-allocations|final_hlo-.*)\.txt$"
)
# The program around the launches, and what runs before and after it.
_SURROUNDINGS = ("TLP", "<")


class Launch(NamedTuple):
    """One kernel or one XLA fusion or copy. Counts are per call and cover all grid steps and cores."""

    name: str
    # "kernel" (Pallas) or "xla".
    kind: str
    calls: int
    bundles: int
    # Bundles of the code, each counted once.
    static_bundles: int
    # Slot name: how many slots of this kind are filled, and how many a bundle has.
    filled: dict[str, int]
    capacity: dict[str, int]
    # Of a kernel: all VMEM that the compiler gave it, and bytes by purpose; what these leave are spills.
    vmem_bytes: int
    vmem: dict[str, int]
    # Bundles of the core that runs most of them: the share of one of two cores is half at best.
    busiest_core: int
    # Cores of one chip that share the grid.
    cores: int
    assumptions: list[str]

    def utilization(self, slot: str) -> float:
        """Percent of this kind of slot that is filled, over all bundles that run."""
        return 100 * self.filled[slot] / max(1, self.capacity[slot] * self.bundles)


class Profile(NamedTuple):
    """What one compiled program costs; `temp_bytes` of HBM, `moved` by XLA without computing."""

    launches: list[Launch]
    moved: list[hlo_text.Moved]
    temp_bytes: int
    # What the compiler did not dump, or does not say: figures that are too low for it.
    warnings: list[str]

    def bundles(self, kind: str) -> int:
        """Bundles of all launches of a kind, all calls."""
        return sum(launch.bundles * launch.calls for launch in self.launches if launch.kind == kind)


def find_libtpu() -> pathlib.Path | None:
    """libtpu.so: `TPU_LIBRARY_PATH`, else of `make tpu-compiler`, else the installed package, else None."""
    named = os.environ.get("TPU_LIBRARY_PATH")
    if named:
        return pathlib.Path(named) if pathlib.Path(named).is_file() else None
    spec = util.find_spec("libtpu")
    installed = (spec.submodule_search_locations or []) if spec else []
    for folder in (_CHECKOUT / ".libtpu" / "libtpu", *installed):
        library = pathlib.Path(folder) / "libtpu.so"
        if library.is_file():
            return library
    return None


def topology_name(name: str) -> str:
    """The full name of a topology ("v6e:1x1"), from that or from a generation ("v6e").

    Raises:
        ValueError: neither.
    """
    if re.fullmatch(r"[\w-]+:\d+(x\d+)+", name) and name.split(":")[0] in TOPOLOGIES:
        return name
    if name not in TOPOLOGIES:
        raise ValueError(
            f"topology must be one of {', '.join(TOPOLOGIES)}, or a full name such as "
            f"{TOPOLOGIES['v5p']}; got {name!r}."
        )
    return TOPOLOGIES[name]


def compiler_environment(dump_folder: str | os.PathLike[str] | None) -> dict[str, str]:
    """The environment of a process that compiles for TPUs and dumps its launches into a folder, if there is one.

    Raises:
        FileNotFoundError: there is no libtpu on this machine.
    """
    library = find_libtpu()
    if library is None:
        named = os.environ.get("TPU_LIBRARY_PATH")
        looked = f"TPU_LIBRARY_PATH={named} is no file" if named else "it is not installed"
        hint = "Run `make tpu-compiler`, or set TPU_LIBRARY_PATH to the libtpu.so that your jax wants"
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            hint = "It exists for Linux on x86-64 only"
        raise FileNotFoundError(f"The TPU compiler needs libtpu; {looked}. {hint}.")
    flags = {}
    if dump_folder is not None:
        flags = {
            "xla_jf_dump_to": os.fspath(dump_folder),
            "xla_jf_dump_llo_text": "true",
            "xla_jf_dump_llo_pass_label_regex": "final.*",
        }
    return {
        **os.environ,
        "TPU_LIBRARY_PATH": str(library.resolve()),
        # The same code as here, wherever the process runs.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_CHECKOUT), os.environ.get("PYTHONPATH")])),
        # Flags that the user set stay; of two equal ones the last counts.
        "LIBTPU_INIT_ARGS": " ".join(
            [os.environ.get("LIBTPU_INIT_ARGS", ""), *(f"--{name}={value}" for name, value in flags.items())]
        ).strip(),
        "JAX_PLATFORMS": "cpu",
        # No chip, no pod and no metadata server is to be looked for; several processes may load the library.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        # What comes from the cache is not compiled, and dumps nothing.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


def run_worker(arguments: Sequence[str], dump_folder: str | os.PathLike[str] | None) -> Any:
    """Runs this Python with `arguments` as a process that may compile for TPUs, without dumps for `None`.

    Returns:
        the JSON value that it printed last.

    Raises:
        FileNotFoundError: there is no libtpu on this machine.
        RuntimeError: the process failed; what it wrote to stderr is written to ours.
    """
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, env=compiler_environment(dump_folder), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise RuntimeError(
            f"the TPU compiler's process ended with status {done.returncode}; it says why above."
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def devices(topology: str) -> list[Any]:
    """The devices of a topology, to compile for; only in a process with `compiler_environment`.

    Raises:
        ValueError: an unknown topology.
    """
    name = topology_name(topology)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"the compiler does not know topology {name!r} ({first}). Use one of {', '.join(TOPOLOGIES)}."
        ) from error


def compile_for(device: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` compiled for one device; arguments are pytrees of arrays or of their shapes."""
    mesh = Mesh(np.array([device]), ("one",))
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments)
    # Without the mesh Pallas sees the CPU and refuses.
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*shapes).compile()


def backward_of(
    device: Any, function: Callable[..., Any], *arguments: Any
) -> tuple[Callable[..., Any], Any, Any]:
    """The backward pass alone: a function of residuals and cotangents, and the shapes of both.

    `jax.vjp` inside a jitted function would compile the forward pass along with it. The function that it
    returns is a pytree whose leaves are the residuals, so it can be an argument instead.
    """
    with jax.set_mesh(Mesh(np.array([device]), ("one",))):
        outputs, pullback = jax.eval_shape(lambda *x: jax.vjp(function, *x), *arguments)
    return (lambda vjp, cotangents: vjp(cotangents)), pullback, outputs


def dump_folder() -> pathlib.Path:
    """Where this process's compiler dumps its launches."""
    found = re.findall(r"--xla_jf_dump_to=(\S+)", os.environ.get("LIBTPU_INIT_ARGS", ""))
    if not found:
        raise RuntimeError("profile only in a process with `compiler_environment`; see `run_worker`.")
    return pathlib.Path(found[-1])


def _launch(name: str, vmem: int | None, calls: int, texts: dict[str, str], cores: int) -> Launch:
    """`vmem`: bytes of a kernel, None for what XLA made."""
    allocations = texts["pre-finalize-registers-and-allocations"]
    slots = bundle_dumps.parse_slots(texts["final_hlo-static-per-bundle-utilization"])
    program = bundle_dumps.parse_program(texts["final_bundles"], allocations)
    # What does not ask for its core runs on one.
    cores = cores if program.core_index is not None else 1
    runs = [bundle_dumps.run_counts(program, core) for core in range(cores)]
    counts = np.sum([run.counts for run in runs], axis=0)
    assert len(counts) == len(slots.rows), f"{name}: {len(counts)} bundles, {len(slots.rows)} rows"
    filled = counts @ np.array(slots.rows)
    return Launch(
        name=name,
        kind="xla" if vmem is None else "kernel",
        calls=calls,
        bundles=int(counts.sum()),
        static_bundles=len(counts),
        filled=dict(zip(slots.names, map(int, filled), strict=True)),
        capacity=dict(zip(slots.names, slots.capacity, strict=True)),
        vmem_bytes=vmem or 0,
        # XLA's launches name operands that lie in HBM as well.
        vmem={} if vmem is None else bundle_dumps.vmem_bytes(allocations),
        busiest_core=max(sum(run.counts) for run in runs),
        cores=cores,
        assumptions=sorted({text for run in runs for text in run.assumptions}),
    )


def profile(device: Any, function: Callable[..., Any], *arguments: Any, moved_at_least: int = 0) -> Profile:
    """Compiles `function` for one device and counts the bundles of everything that it launches.

    Args:
        device: one of `devices(topology)`.
        function: what to compile.
        arguments: its arguments, pytrees of arrays or of `jax.ShapeDtypeStruct`.
        moved_at_least: bytes; smaller copies are not listed as moved.

    Raises:
        RuntimeError: not in a process with `compiler_environment`.
    """
    folder = dump_folder()
    # Dumps of what this process compiled before.
    for old in folder.glob("[0-9]*-*"):
        old.unlink()
    compiled = compile_for(device, function, *arguments)
    text = compiled.as_text()
    calls, kernels = hlo_text.count_calls(text), hlo_text.kernel_vmem(text)
    dumps: dict[str, dict[str, str]] = {}
    for path in sorted(folder.iterdir()):
        named = _DUMP.match(path.name)
        if named and not named[1].startswith(_SURROUNDINGS):
            dumps.setdefault(named[1], {})[named[2]] = path.read_text()
    warnings = [f"{name} counts once: its number of turns is not known" for name in calls.unknown_loops]
    warnings += [
        f"{name} counts once: the text does not name it" for name in sorted(dumps.keys() - calls.counts)
    ]
    runs = {name: calls.counts.get(name, 1) for name in dumps}
    code_of = {calls.fingerprints[name]: name for name in dumps if name in calls.fingerprints}
    for name in sorted(calls.counts.keys() - dumps.keys()):
        twin = code_of.get(calls.fingerprints[name])
        if twin is not None:
            runs[twin] += calls.counts[name]
        elif name not in calls.scalars:
            warnings.append(f"{name} is left out: the compiler did not dump it")
    cores = getattr(device, "num_cores", None) or 1
    launches = [_launch(name, kernels.get(name), runs[name], texts, cores) for name, texts in dumps.items()]
    launches.sort(key=lambda x: (x.kind, -x.bundles * x.calls))
    return Profile(
        launches,
        hlo_text.moved_bytes(text, moved_at_least),
        compiled.memory_analysis().temp_size_in_bytes,
        warnings,
    )
