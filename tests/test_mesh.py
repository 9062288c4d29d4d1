"""Meshes: every axis gives the losses of one device, exchanges only what is planned, and is refused by name."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import once
from jax.sharding import PartitionSpec as P

from gdn_jax import GDNConfig
from gdn_jax.mup.spec import ParamSpec, Role
from gdn_jax.sharding import partition_spec
from kernels_pallas.gated_delta_rule import hlo_text
from train import collectives
from train.mesh import MeshOptions, MeshShape, choose_mesh

ROOT = pathlib.Path(__file__).parents[1]

# Each axis beside others; one of them with points of a sweep that four devices share.
TOGETHER = ("fsdp=2,sequence=2,tensor=2", "sweep=2,data=2,fsdp=2")
ALONE = (
    "data=2,fsdp=2,tensor=2",
    *(f"{axis}={n}" for axis in ("data", "fsdp", "sequence", "tensor", "sweep") for n in (2, 4, 8)),
)


def measure(folder, steps, names):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "mesh_cases.py"), str(folder), str(steps), "", *names],
        # Level 1: the programs are tiny, and compiling them takes most of the time. At level 0 sums are taken one
        # by one, which makes 1e-5 of a loss on one device.
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            # Read back from the cache, XLA's program for CPUs has lost the order of exchanges that do not depend on
            # each other: emulated devices then wait for one another forever (sweep=2,data=2,fsdp=2).
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_agrees(measured, name, tolerance):
    result, alone = measured["results"][name], measured["results"][""]
    losses, expected = np.asarray(result["losses"]), np.asarray(alone["losses"])
    if losses.ndim == 2:
        # Point 0 is the run of one device; the others have seeds and learning rates of their own.
        assert not np.allclose(losses[:, 1], expected, atol=1e-4)
        losses = losses[:, 0]
    errors = np.abs(losses - expected)
    print(
        f"{name}: {errors[:10].max():.1e} after 10 steps, {errors.max():.1e} after {len(errors)}; "
        f"{result['exchanges']}"
    )
    assert errors[:10].max() <= 1e-5
    assert errors.max() <= tolerance
    assert not result["unplanned"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return once(tmp_path_factory, "mesh", lambda: measure(tmp_path_factory.mktemp("mesh"), 10, TOGETHER))


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.slow
def test_axes_together_agree_with_one_device(measured, name):
    assert_agrees(measured, name, 1e-5)


@pytest.mark.slow
def test_what_is_exchanged(measured):
    results = measured["results"]
    assert results[""]["exchanges"] == []
    found = set(results["fsdp=2,sequence=2,tensor=2"]["exchanges"])
    assert {"all-gather fsdp", "all-reduce tensor", "collective-permute sequence"} <= found
    assert not any("to-all" in name for name in found)
    # Points know nothing of each other.
    found = set(results["sweep=2,data=2,fsdp=2"]["exchanges"])
    assert {"all-gather fsdp", "all-reduce data+fsdp"} <= found
    assert not any("sweep" in name or "permute" in name for name in found)


@pytest.mark.slow
def test_initialised_in_parts(measured):
    results = measured["results"]
    assert results["fsdp=2,sequence=2,tensor=2"]["parts"] == 4
    assert results["fsdp=2,sequence=2,tensor=2"]["largest_in_init"] < measured["whole"]
    assert results[""]["largest_in_init"] >= measured["whole"]


@pytest.mark.long
def test_every_axis_alone_for_50_steps(tmp_path):
    measured = measure(tmp_path, 50, ALONE)
    for name in ALONE:
        assert_agrees(measured, name, 1e-4)


CONFIG = GDNConfig(
    width=96, num_key_heads=6, num_value_heads=6, key_dim=8, value_dim=16, mlp_width=192, vocab_size=257
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": 3}, r"multiply to the 8 devices there are; got data 3 .* = 3\. Valid: data 8; "),
        ({"tensor": 16}, r"multiply to the 8 devices .* = 16\. Valid: "),
        ({"tensor": 4}, r"--mesh.tensor must divide the number of key heads \(6\); got 4\. Valid: "),
        ({"sequence": 8}, r"sequence must leave each device conv_size - 1 = 3 tokens of 16; got 8\. Valid: "),
        ({"fsdp": 0}, r"--mesh.fsdp must be positive; got 0"),
    ],
)
def test_wrong_factorizations_name_valid_ones(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        choose_mesh(MeshOptions(**options), 8, CONFIG, batch_size=8, sequence_length=16)
    assert "\n" not in str(caught.value)


def test_the_valid_ones_that_are_named_are_valid():
    with pytest.raises(ValueError, match="Valid") as caught:
        choose_mesh(MeshOptions(fsdp=2, tensor=8), 8, CONFIG, batch_size=4, sequence_length=16)
    named = str(caught.value).split("Valid: ")[1].rstrip(".").split("; ")
    # What stays closest to what was asked for comes first.
    assert "fsdp 2" in named[0]
    for text in named:
        if not text.startswith("and "):
            sizes = {name: int(size) for name, size in (pair.split() for pair in text.split(", "))}
            options = MeshOptions(**{"data": 1} | sizes)
            assert choose_mesh(options, 8, CONFIG, batch_size=4, sequence_length=16).devices == 8


def test_a_batch_or_width_that_devices_do_not_divide():
    with pytest.raises(ValueError, match=r"multiple of the 8 devices along data and fsdp, as 16 is; got 12"):
        choose_mesh(MeshOptions(), 8, CONFIG, batch_size=12, sequence_length=16)
    with pytest.raises(ValueError, match=r"--mesh.fsdp must divide the width \(96\); got 5"):
        choose_mesh(MeshOptions(fsdp=5), 5, CONFIG, batch_size=5, sequence_length=16)
    assert choose_mesh(MeshOptions(fsdp=4), 8, CONFIG, batch_size=8, sequence_length=16) == MeshShape(
        data=2, fsdp=4
    )


def test_the_table():
    devices = {"data": 2, "fsdp": 2, "tensor": 3}
    assert partition_spec(("batch", "time", "embed"), (4, 8, 96), devices) == P(("data", "fsdp"), None, None)
    assert partition_spec(("embed", "key_heads", "key_dim"), (96, 6, 8), devices) == P("fsdp", "tensor", None)
    # Bytes have 257 ids, which stay whole; heads must divide.
    assert partition_spec(("vocab", "embed"), (257, 96), devices) == P(None, "fsdp")
    with pytest.raises(ValueError, match="key_heads \\(4\\) must be a multiple of the 3 devices"):
        partition_spec(("embed", "key_heads", "key_dim"), (96, 4, 8), devices)
    with pytest.raises(ValueError, match="logical axes must be among"):
        partition_spec(("width",), (96,), devices)


SIZES = {"sweep": 1, "data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("[4,2]<=[8]", ("tensor",)),
        ("[4,2]<=[4,2]T(1,0)", ("fsdp",)),
        ("[4,2]<=[2,2,2]T(2,1,0)", ("data",)),
        ("{{0,2},{4,6},{1,3},{5,7}}", ("fsdp",)),
        ("{{0,1,2,3},{4,5,6,7}}", ("fsdp", "tensor")),
        ("mesh['sweep'=1,'data'=2,'fsdp'=2,'sequence'=1,'tensor'=2] {'data','fsdp'}", ("data", "fsdp")),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", ("tensor",)),
        ("{}", ("data", "fsdp", "tensor")),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", ()),
    ],
)
def test_axes_of_groups(groups, axes):
    assert collectives.axes_of_groups(groups, SIZES) == axes


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="one of XLA's notations"):
        collectives.axes_of_groups("mesh['x'=8] {'x':(1)2}", SIZES)


PROGRAM = """
%all-reduce-scatter.1 (i: bf16[96,6,8]) -> bf16[48,6,8] {
  %i = bf16[96,6,8]{2,1,0} parameter(0)
  %r = bf16[96,6,8]{2,1,0} all-reduce(%i), channel_id=1, replica_groups=[4,2]<=[4,2]T(1,0), to_apply=%add
  ROOT %s = bf16[48,6,8]{2,1,0} dynamic-slice(%r)
}

%start (i: f32[48,6,8]) -> f32[96,6,8] {
  ROOT %g.1 = f32[96,6,8]{2,1,0} all-gather(%i), channel_id=7, replica_groups=GROUPS, attributes={chain_id="0"}
}

%done (i: f32[48,6,8]) -> f32[96,6,8] {
  ROOT %g.2 = f32[96,6,8]{2,1,0} all-gather(%i), channel_id=7, replica_groups=GROUPS, attributes={chain_id="0"}
}

%called (i: f32[48,6,8]) -> f32[96,6,8] {
  %i = f32[48,6,8]{2,1,0} parameter(0)
  ROOT %g.3 = f32[96,6,8]{2,1,0} all-gather(%i), channel_id=9, replica_groups=GROUPS
}, execution_thread="sparsecore"

ENTRY %main (p: f32[4,8,48]) -> f32[4,8,96] {
  %p = f32[4,8,48]{2,1,0} parameter(0)
  %f.1 = f32[96,6,8]{2,1,0} fusion(%p), kind=kCustom, calls=%start
  %f.2 = f32[96,6,8]{2,1,0} fusion(%p), kind=kCustom, calls=%done
  %f.3 = bf16[48,6,8]{2,1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %c.1 = ((), (), (s32[1]{0:T(128)S(2)})) call-start(%p), async_execution_thread="sparsecore", to_apply=%called
  %t = f32[4,8,96]{2,1,0} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%add
  %n = f32[] all-reduce(%p), replica_groups={}, to_apply=%add
  ROOT %a = (f32[4,8,48]{2,1,0}, f32[4,8,96]{2,1,0}) all-gather-start(%p), replica_groups=GROUPS
}
""".replace("GROUPS", "[4,2]<=[4,2]T(1,0)")


def test_an_activation_that_is_gathered_is_not_planned():
    found = {x.kind: x for x in hlo_text.collectives(PROGRAM)}
    # The fusions that start and end one exchange are one; a summed and sliced array is scattered.
    assert len(hlo_text.collectives(PROGRAM)) == 6
    assert found["reduce-scatter"].bytes == 2 * 48 * 6 * 8
    assert found["all-gather"].bytes in (4 * 96 * 6 * 8, 4 * 4 * 8 * 96)
    key = ParamSpec(
        ("layers", "embed", "key_heads", "key_dim"),
        ("embed",),
        ("key_heads", "key_dim"),
        Role.MATRIX,
        96,
        (3, 96, 12, 8),
    )
    # A reader that overlooks exchanges would find nothing wrong.
    with pytest.raises(ValueError, match=r"nothing was seen to call: g\.3"):
        hlo_text.collectives(PROGRAM.replace("call-start", "unheard-of"))
    exchanges = collectives.exchanges(PROGRAM, SIZES)
    (wrong,) = collectives.unplanned(exchanges, {"k": key}, SIZES)
    assert wrong.kind == "all-gather"
    assert wrong.collective.arrays == (("f32", 4 * 8 * 96),)
    assert collectives.say(wrong) == "all-gather along fsdp of 3,072 x f32, from the compiler"
