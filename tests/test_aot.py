"""`gdn compile`: what the compiler says is read rightly, and (long) every configuration compiles and is judged."""

import dataclasses
import json
import math

import jax
import pytest

from gdn_jax.mup.spec import ParamSpec
from train.__main__ import main
from train.aot import HBM, MODELS, CompileOptions, _from_json, _refusal, compile_job, describe, plan
from train.config import ModelOptions, OptimizerOptions
from train.mesh import MeshOptions, MeshShape
from train.step import Program


def _job(topology, size, **mesh):
    return plan(CompileOptions(topology=topology, size=size), ModelOptions(), MeshOptions(**mesh))


@pytest.mark.parametrize(("size", "billions"), [("1.3b", 1.3), ("7b", 7.0), ("30b", 30.0)])
def test_models_have_as_many_parameters_as_they_say(size, billions):
    specs = Program(MODELS[size], OptimizerOptions(), 1).specs
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    assert sum(math.prod(spec.sizes) for spec in leaves) / 1e9 == pytest.approx(billions, rel=0.05)


def test_a_mesh_where_none_is_given():
    job = _job("v5e:16x16", "7b")
    assert job.shape == MeshShape(data=8, fsdp=32)
    assert job.batch_size == 256
    # Two devices a chip.
    assert _job("tpu7x:4x4x4", "1.3b").shape.devices == 128
    assert _job("v5p:8x8x8", "30b", fsdp=64, tensor=8).shape == MeshShape(fsdp=64, tensor=8)
    assert _from_json(json.dumps(dataclasses.asdict(job))) == job


@pytest.mark.parametrize(
    "text",
    [
        "the total memory required for HLO temporaries (18.50G) exceeds available HBM (15.75G). HLO module: x",
        "Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm. Exceeded hbm capacity by 2.75G.",
    ],
)
def test_a_refusal_is_read_with_its_numbers(text):
    read = _refusal(f"RESOURCE_EXHAUSTED: E1000: {text}\nmore")
    assert read["used_gib"] == 18.5
    assert read["hbm_gib"] == 15.75
    assert _refusal(text.replace("18.50G", "2.00T"))["used_gib"] == 2048


def test_another_failure_is_no_verdict():
    with pytest.raises(RuntimeError, match="scoped vmem"):
        _refusal("INTERNAL: ran out of scoped vmem")


def test_the_report_as_lines():
    report = {
        "topology": "v5e:16x16", "devices": 256, "mesh": {"data": 8, "fsdp": 32, "tensor": 1}, "parameters": 7e9,
        "tokens_per_step": 1048576, "flops_per_step": 5e16, "compile_seconds": 61.2, "hbm_gib": 15.75,
        "fits": False, "short_by_gib": 2.75, "used_gib": 18.5, "refused": "…", "memory_gib": {"code": 0.1},
        "exchanges": [{"kind": "all-gather", "axes": ["fsdp"], "calls": 9, "bytes": 3_000_000}],
        "unplanned": [],
    }  # fmt: skip
    lines = describe(report)
    assert lines[0] == "7.00 B parameters on v5e:16x16 (256 devices): data 8, fsdp 32"
    assert "all-gather along fsdp: 9 calls, 3.0 MB a step" in lines
    assert lines[-1] == (
        "does not fit: 18.50 GiB on each device, 2.75 GiB more than the 15.75 GiB of HBM there are"
    )
    assert describe(report | {"fits": True})[-1].startswith("fits: 18.50 of 15.75 GiB")


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", ["1.3b", "7b", "30b"])
@pytest.mark.parametrize("topology", ["v5e:16x16", "v5p:8x8x8", "v6e:16x16", "tpu7x:4x4x4"])
def test_every_configuration_compiles_and_fits(libtpu, topology, size):
    report = compile_job(_job(topology, size))
    print("\n".join(describe(report)))
    assert report["fits"]
    assert report["hbm_gib"] == HBM[topology.split(":")[0]]
    assert not report["unplanned"]
    kinds = {(row["kind"], *row["axes"]) for row in report["exchanges"]}
    assert ("all-gather", "fsdp") in kinds
    # For tpu7x the compiler sums gradients whole.
    assert ("reduce-scatter", "fsdp") in kinds or topology.startswith("tpu7x")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_what_is_too_large_is_refused_with_the_numbers(libtpu, capsys):
    """30 B parameters with their optimizer's state, whole on every chip: 356 GiB at least."""
    with pytest.raises(SystemExit) as stop:
        main(["compile", "--topology", "v5e:16x16", "--size", "30b", "--mesh.data", "256"])
    assert stop.value.code == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    print(verdict)
    assert verdict.startswith("does not fit: ")
    assert float(verdict.split()[3]) > 330
    assert "15.75 GiB of HBM" in verdict
