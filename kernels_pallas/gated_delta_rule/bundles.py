"""Profiles the op on a TPU that is not there: `python -m kernels_pallas.gated_delta_rule.bundles`.

The TPU compiler runs on any Linux machine with an x86-64 CPU; it says which VLIW bundles it issues, and the
op is bound by these on every TPU so far (HBM and MXU floors are several times lower). The figure is bundles
per token-head, summed over all grid steps and cores: issue cycles where no DMA or semaphore is waited for,
which nothing here can see. Kernels and what XLA adds around them are kept apart.
"""

import argparse
import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.gated_delta_rule import tpu_compiler
from kernels_pallas.gated_delta_rule.api import gated_delta_rule
from kernels_pallas.gated_delta_rule.shapes import SHAPES, Shape

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_PASSES = ("forward", "backward")
_MODULE = "kernels_pallas.gated_delta_rule.bundles"
_SHORT = {"VLOAD": "load", "VLOAD:FILL": "fill", "VSTORE": "store", "VSTORE:SPILL": "spill"}
_MIB = 1 << 20


def _operands(shape: Shape, dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    time = (shape.batch, shape.length)
    key = jax.ShapeDtypeStruct((*time, shape.key_heads, shape.key_dim), dtype)
    value = jax.ShapeDtypeStruct((*time, shape.value_heads, shape.value_dim), dtype)
    gate = jax.ShapeDtypeStruct((*time, shape.value_heads), jnp.float32)
    return key, key, value, gate, gate


def profile_pass(
    topology: str, shape: Shape, dtype: str, implementation: str, which: str
) -> tpu_compiler.Profile:
    """Profiles the forward or the backward pass of the op on one device of a topology.

    The backward pass is a program of its own here: residuals and dO in, five gradients out. What XLA moves is
    listed from the size of q on.

    Raises:
        NotImplementedError: the implementation cannot.
        RuntimeError: not in a process with `tpu_compiler.compiler_environment`.
    """
    device = tpu_compiler.devices(topology)[0]
    operands = _operands(shape, _DTYPES[dtype])

    def forward(*x: jax.Array) -> jax.Array:
        return gated_delta_rule(*x, implementation=implementation)[0]

    q = operands[0]
    at_least = q.size * q.dtype.itemsize
    if which == "forward":
        return tpu_compiler.profile(device, forward, *operands, moved_at_least=at_least)
    program = tpu_compiler.backward_of(device, forward, *operands)
    return tpu_compiler.profile(device, *program, moved_at_least=at_least)


def _as_json(profile: tpu_compiler.Profile, token_heads: int) -> dict[str, Any]:
    launches = [
        {
            **launch._asdict(),
            "bundles_per_token_head": launch.bundles * launch.calls / token_heads,
            "utilization_percent": {slot: launch.utilization(slot) for slot in launch.filled},
        }
        for launch in profile.launches
    ]
    return {
        "kernel_bundles_per_token_head": profile.bundles("kernel") / token_heads,
        "xla_bundles_per_token_head": profile.bundles("xla") / token_heads,
        "temp_bytes": profile.temp_bytes,
        "launches": launches,
        "moved": [moved._asdict() for moved in profile.moved],
        "warnings": profile.warnings,
    }


def _work(request: dict[str, Any]) -> dict[str, Any]:
    """In the compiler's process: the answer, or what to tell the user."""
    shape = Shape(*request["shape"])
    try:
        profile = profile_pass(
            request["topology"], shape, request["dtype"], request["implementation"], request["pass"]
        )
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return {"error": str(error)}
    return _as_json(profile, shape.batch * shape.length * shape.value_heads)


def _table(result: dict[str, Any], most: int) -> str:
    launches = result["launches"]
    slots = list(launches[0]["capacity"]) if launches else []
    head = f"  {'launch':34}{'calls':>6}{'per t-h':>9}{'static':>8}"
    head += "".join(f"{_SHORT.get(slot, slot):>6}" for slot in slots) + f"{'spills':>9}{'VMEM MiB':>10}"
    lines = [head + "   slots in % of capacity"]
    kernels = [x for x in launches if x["kind"] == "kernel"]
    others = [x for x in launches if x["kind"] != "kernel"]
    for launch in kernels + others[:most]:
        name = launch["name"] if launch["kind"] == "kernel" else f"xla: {launch['name']}"
        spills = launch["filled"].get("VSTORE:SPILL", 0) * launch["calls"]
        line = f"  {name[:33]:34}{launch['calls']:>6}{launch['bundles_per_token_head']:>9.3f}"
        line += f"{launch['static_bundles']:>8}"
        line += "".join(f"{launch['utilization_percent'][slot]:>6.1f}" for slot in slots)
        vmem = f"{launch['vmem_bytes'] / _MIB:.2f}" if launch["kind"] == "kernel" else "-"
        lines.append(line + f"{spills:>9}{vmem:>10}")
    if len(others) > most:
        rest = sum(x["bundles_per_token_head"] for x in others[most:])
        lines.append(f"  {f'xla: {len(others) - most} more':34}{'':>6}{rest:>9.3f}")
    for launch in kernels:
        told = launch["vmem"] | {"spills": launch["vmem_bytes"] - sum(launch["vmem"].values())}
        line = ", ".join(f"{what} {size / 1024:.0f}" for what, size in told.items())
        line = f"  {launch['name']}: VMEM KiB: {line}"
        if launch["cores"] > 1:
            share = 100 * launch["busiest_core"] / max(1, launch["bundles"])
            line += f"; {launch['cores']} cores, the busiest runs {share:.0f} %"
        lines.append(line)
    for launch in launches:
        lines += [f"  {launch['name']}: {text}" for text in launch["assumptions"]]
    for moved in result["moved"]:
        size = moved["bytes"] / _MIB
        lines.append(f"  XLA moves {size:.2f} MiB x {moved['calls']}: {moved['opcode']} {moved['name']}")
    return "\n".join(lines + [f"  warning: {text}" for text in result["warnings"]])


def _print(report: dict[str, Any], most: int) -> None:
    sizes = "  ".join(f"{axis}={size}" for axis, size in zip("BTHGKV", report["shape"], strict=True))
    print(f"{report['topology']}  {report['implementation']}  {report['dtype']}  {sizes}")
    for which, result in report["passes"].items():
        print(
            f"\n{which}: {result['kernel_bundles_per_token_head']:.3f} bundles per token-head in kernels, "
            f"{result['xla_bundles_per_token_head']:.3f} in XLA's launches; temporary HBM "
            f"{result['temp_bytes'] / _MIB:.2f} MiB"
        )
        print(_table(result, most))
    print()


def main(argv: list[str] | None = None) -> None:
    """Profile and print, one topology and pass after another."""
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=__doc__)
    parser.add_argument(
        "--topology",
        nargs="+",
        default=["v6e"],
        metavar="NAME",
        help=f"{', '.join(tpu_compiler.TOPOLOGIES)}, or full names such as v5p:2x2x1; default: v6e",
    )
    parser.add_argument("--shape", choices=SHAPES, default="tpu_profile", help="default: tpu_profile")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="bfloat16", help="of q, k and v; default: bfloat16"
    )
    parser.add_argument("--implementation", default="mosaic_tpu", help="default: mosaic_tpu")
    parser.add_argument("--pass", dest="which", choices=[*_PASSES, "both"], default="both")
    parser.add_argument("--launches", type=int, default=8, help="XLA launches to list a pass; default: 8")
    parser.add_argument("--dump", type=pathlib.Path, metavar="FOLDER", help="keep the compiler's dumps here")
    parser.add_argument("--json", action="store_true", help="print one JSON list, an entry per topology")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker is not None:
        print(json.dumps(_work(json.loads(options.worker))))
        return
    try:
        names = [tpu_compiler.topology_name(name) for name in options.topology]
    except ValueError as error:
        parser.error(str(error))
    passes = _PASSES if options.which == "both" else (options.which,)
    reports = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            setting = {
                "topology": name,
                "implementation": options.implementation,
                "dtype": options.dtype,
                "shape": SHAPES[options.shape],
            }
            report: dict[str, Any] = {**setting, "passes": {}}
            for which in passes:
                folder = (options.dump or pathlib.Path(scratch)).resolve() / name.replace(":", "_") / which
                folder.mkdir(parents=True, exist_ok=True)
                request = json.dumps({**setting, "pass": which})
                try:
                    result = tpu_compiler.run_worker(["-m", _MODULE, "--worker", request], folder)
                except (FileNotFoundError, RuntimeError) as error:
                    sys.exit(f"{parser.prog}: {error}")
                if "error" in result:
                    sys.exit(f"{parser.prog}: {name}, {which}: {result['error']}")
                report["passes"][which] = result
            reports.append(report)
            if not options.json:
                _print(report, options.launches)
    if options.json:
        print(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main()
