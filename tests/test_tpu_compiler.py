"""The TPU profiler: its readers of the compiler's text on small samples, and the real compiler on a toy."""

import json

import pytest
import tpu_toy as toy

from kernels_pallas.gated_delta_rule import bundle_dumps, bundles, hlo_text, tpu_compiler
from kernels_pallas.gated_delta_rule.shapes import Shape

# As libtpu 0.0.50 writes it, vector part left out: a grid of 2 x 3 with a stage for DMAs ahead (hence 7
# turns), a region for the first column only, and an inner loop of 5 turns. Branches have four delay slots.
BUNDLES = """= control target key start
LB: loop body
= control target key end

     0   :  { %s10_s0 = smov 0  ;;  %s11_s1 = smov 0  ;;  %v1_v0 = vld [vmem:[%s9_s3] sm:$0xff] }
   0x1   :  { %90 = sst [smem:[#allocation7_spill]] %s11_s1 } /* Start region 5 :: End region 5 */
   0x2 LB: > { %s20_s0 = sphi %s10_s0, %s40_s0  ;;  %s21_s1 = sphi %s11_s1, %s41_s1 } /* Start region 7 */
   0x3   : > { %s91_s2 = sld [smem:[#allocation7_spill]]  ;;  %p1_p0 = scmp.ge.s32.totalorder %s20_s0, 1 }
   0x4   : > { %p2_p1 = scmp.lt.s32.totalorder %s20_s0, 7  ;;  %s22_s2 = sadd.s32 4294967295, %s20_s0 }
   0x5   : > { %p3_p2 = pnand %p1_p0, %p2_p1  ;;  %1 = dma.hbm_to_vmem [thread:$0]  /* a comment
of two lines with %s20_s0 = smov 99 */ }
   0x6   : > { %2 = sbr.rel (%p3_p2) target = $region28 } /* Start region 26 */
   0x7   :  {}
   0x8   :  {}
   0x9   :  {}
   0xa   : > { %p4_p3 = scmp.ne.s32.totalorder (!%p3_p2), %s21_s1, 0 } /* End region 26 */
   0xb   : > { %3 = sbr.rel (%p4_p3) target = $region32 } /* Start region 27 :: Start region 30 */
   0xc   :  {}
   0xd   :  {}
   0xe   :  {}
   0xf   :  {} /* End region 30 */
  0x10   : > { %4 = vst [vmem:[#allocation3] sm:$0xff] %v1_v0 } /* Start region 31 :: End region 31 */
  0x11 PF: > { %s30_s4 = smov 0 } /* Start/End empty region 32 */
  0x12 LB: >> { %s31_s4 = sphi %s30_s4, %s32_s4 } /* Start region 33 */
  0x13   : >> { %s32_s4 = sadd.s32 1, %s31_s4 }
  0x14   : >> { %p5_p4 = scmp.ge.s32.totalorder %s32_s4, 5 /* loop exit test */ } /* End region 33 :: Start region 34 */
  0x15   : >> { %5 = sbr.rel (!%p5_p4) target = $region33 }
  0x16   : >> {}
  0x17   : >> {}
  0x18   : >> {}
  0x19   : > { %v2_v0 = vadd.f32 (%p5_p4), %v1_v0, %v1_v0 } /* End region 34 */
  0x1a   : > { %6 = vst [vmem:[#allocation3] sm:$0xff] %v1_v0 } /* End region 27 */
  0x1b PF: > { %s40_s0 = sadd.s32 1, %s20_s0  ;;  %s39_s1 = sadd.s32 1, %s21_s1 } /* Start/End empty region 28 */
  0x1c   : > { %p6_p5 = scmp.ge.s32.totalorder %s39_s1, 3  ;;  %s38_s1 = scalar_select %p3_p2, %s21_s1, %s39_s1 }
  0x1d   : > { %s41_s1 = smov (%p6_p5, %s38_s1), 0  ;;  %p7_p6 = scmp.ge.s32.totalorder %s40_s0, 8 } /* End region 7 */
  0x1e   :  { %7 = sbr.rel (!%p7_p6) target = $region7 } /* Start region 8 */
  0x1f   :  {}
  0x20   :  {}
  0x21   :  {}
  0x22   :  {} /* End region 8 */
  0x23   :  {} /* exit bundle: %toy.1 = custom-call(%x, %w) */
"""
ALLOCATIONS = """$region0: #{toy.1}
  #allocation0 [shape = 'u32[]', space=smem, tag = 'smem constant byte address 0x4 - core index']
  #allocation3 [shape = 'f32[8,128]', space=vmem, size = 0x1000, scoped, tag = 'scratch operand']
  #allocation4 [space=vmem, size = 0x2000, tag = 'input window allocation for operator input 0. The window']
  #allocation5 [space=vmem, size = 0x2000, tag = 'input window allocation for operator input 1. The window']
  #allocation6 [shape = 'u8[8192]', space=vmem, size = 0xffffffffffffffff, tag = 'unknown']
      $region26: #{toy.1} parent=7 // pred_check_branch
        %2 = sbr.rel (%p3_p2) target = $region28
        $region30: #{toy.1} parent=27 // pred_check_branch
          %3 = sbr.rel (%p4_p3) target = $region32
        $region34: #{toy.1} parent=27 // loop_header_branch
          %5 = sbr.rel (!%p5_p4) target = $region33
    $region8: #{toy.1} parent=0 // loop_header_branch
      %7 = sbr.rel (!%p7_p6) target = $region7
"""
SLOTS = """== CAPACTIY:
MXU, VLOAD, VLOAD:FILL
    2     3     3
== UTILIZATION:
2 0 0
0 3 1
"""
PROGRAM = """HloModule jit_f

%moving (p0: f32[4,8]) -> f32[8,4] {
  %p0 = f32[4,8]{1,0} parameter(0)
  ROOT %t.1 = f32[8,4]{0,1} transpose(%p0), dimensions={1,0}
}

%adding (p1: f32[4,8]) -> f32[8,4] {
  %p1 = f32[4,8]{1,0} parameter(0)
  %t.2 = f32[8,4]{0,1} transpose(%p1), dimensions={1,0}
  ROOT %a.1 = f32[8,4]{0,1} add(%t.2, %t.2)
}

%below (c: (s32[], f32[8,4])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (b: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %b = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %x.2 = f32[8,4]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %copy.2 = f32[8,4]{0,1:T(8,128)} copy(%x.2), metadata={op_name="y"}
  ROOT %r = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%b, %copy.2)
}

ENTRY %main (x: f32[4,8], y: bf16[4,8]) -> f32[8,4] {
  %x = f32[4,8]{1,0:T(8,128)} parameter(0)
  %y = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(1)
  %start = s32[] constant(2)
  %f.1 = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%moving, metadata={op_name="one"}
  %f.2 = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%adding
  %f.3 = f32[8,4]{1,0} fusion(%x), kind=kLoop, calls=%moving, metadata={op_name="two"}
  %small = bf16[4,8]{0,1} copy(%y)
  %view = f32[8,4]{1,0} bitcast(%x)
  %ahead = (f32[4,8]{1,0:S(1)}, f32[4,8]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %toy.1 = f32[8,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={VMEM}
  %joined = f32[8,4]{1,0} custom-call(%toy.1), custom_call_target="ConcatBitcast"
  %all = (s32[], f32[8,4]{1,0}) tuple(%start, %f.1)
  %w = (s32[], f32[8,4]{1,0}) while(%all), condition=%below, body=%body
  ROOT %o = f32[8,4]{1,0} get-tuple-element(%w), index=1
}
"""


VMEM = (
    '{"scoped_memory_configs":[],"used_scoped_memory_configs":'
    '[{"memory_space":"1","offset":"0","size":"65536"},{"memory_space":"0","offset":"0","size":"4"}]}'
)
PROGRAM = PROGRAM.replace("{VMEM}", VMEM)


def runs(text, core=0):
    return bundle_dumps.run_counts(bundle_dumps.parse_program(text, ALLOCATIONS), core)


def test_each_bundle_runs_as_often_as_its_loops_and_regions_do():
    counts, assumptions = runs(BUNDLES)
    assert assumptions == []
    assert counts[:2] == [1, 1]
    # The grid loop, and the check of the region that computes: 8 turns.
    assert set(counts[0x2:0xB]) == {8}
    # It computes on 6 of them; the first column, twice; the inner loop, five times on each.
    assert set(counts[0xB:0x10]) == {6}
    assert counts[0x10] == 2
    assert counts[0x11] == 6
    assert set(counts[0x12:0x1A]) == {30}
    assert counts[0x1A] == 6
    # The delay slots of the last branch still belong to the loop.
    assert set(counts[0x1B:0x23]) == {8}
    assert counts[0x23] == 1


def test_the_cores_of_a_chip_share_the_grid():
    limit = "%s8_s9 = sld [smem:[#allocation0]]  ;;  %s10_s0 = smov 0"
    shared = BUNDLES.replace("%s10_s0 = smov 0", limit).replace("%s20_s0, 7", "%s20_s0, %s7_s9")
    # Core 0 takes four steps of the grid, core 1 two.
    shared = shared.replace(
        "%90 = sst", "%s6_s9 = sshll.u32 %s8_s9, 1  ;;  %s7_s9 = ssub.s32 5, %s6_s9  ;;  %90 = sst"
    )
    program = bundle_dumps.parse_program(shared, ALLOCATIONS)
    assert program.core_index == "#allocation0"
    counts = [bundle_dumps.run_counts(program, core).counts for core in (0, 1)]
    assert [x[0x1A] for x in counts] == [4, 2]
    assert [x[0x13] for x in counts] == [20, 10]
    assert bundle_dumps.parse_program(BUNDLES, ALLOCATIONS).core_index is None


def test_what_depends_on_data_is_named():
    counts, assumptions = runs(
        BUNDLES.replace("%s32_s4, 5", "%s99_s4, 5").replace("%s21_s1, 0 }", "%s98_s1, 0 }")
    )
    assert counts[0x10] == counts[0x13] == 6
    assert assumptions == [
        "bundle 0xb: a region counts as run, its condition depends on data",
        "bundle 0x15: a loop counts as run once, its condition depends on data",
    ]


def test_where_no_end_of_a_branch_is_named_one_delay_slot_follows():
    counts, _ = runs(BUNDLES.replace("%v1_v0, %v1_v0 } /* End region 34 */", "%v1_v0, %v1_v0 }"))
    assert set(counts[0x12:0x17]) == {30}
    assert set(counts[0x17:0x1B]) == {6}


def test_a_branch_to_the_exit():
    # v5p: the second core leaves at once, and the target's number is lost to the exit bundle.
    text = "0 : { %p0_p0 = scmp.ne.s32.totalorder 1, 0 }\n0x1 : { %2 = sbr.rel (%p0_p0) target = $region4 }\n"
    exit_bundle = "0x2 : {}\n0x3 : {}\n0x4 PF: {} /* exit bundle: %iota = iota() */\n"
    assert runs(text + exit_bundle).counts == [1, 1, 1, 0, 1]


def test_texts_of_something_else_are_refused():
    with pytest.raises(ValueError, match="holds no bundle"):
        bundle_dumps.parse_program("", ALLOCATIONS)
    with pytest.raises(ValueError, match="region 77"):
        bundle_dumps.parse_program(BUNDLES.replace("target = $region28", "target = $region77"), ALLOCATIONS)
    with pytest.raises(ValueError, match="static-per-bundle"):
        bundle_dumps.parse_slots("Schedule analysis:\n\ttotal scheduled bundles: 99\n\tempty")
    with pytest.raises(ValueError, match="3 figures"):
        bundle_dumps.parse_slots(SLOTS + "1 2\n")
    with pytest.raises(ValueError, match="ENTRY"):
        hlo_text.moved_bytes("", 0)


def test_slots_and_vmem():
    slots = bundle_dumps.parse_slots(SLOTS)
    assert slots.names == ["MXU", "VLOAD", "VLOAD:FILL"]
    assert slots.capacity == [2, 3, 3]
    assert slots.rows == [[2, 0, 0], [0, 3, 1]]
    assert bundle_dumps.vmem_bytes(ALLOCATIONS) == {"scratch operand": 4096, "input windows": 16384}


def test_moved_bytes_lists_what_only_moves():
    assert hlo_text.moved_bytes(PROGRAM, 128) == [
        hlo_text.Moved("copy.2", "copy", 128, 5),
        hlo_text.Moved("f.1", "fusion", 128, 1),
        hlo_text.Moved("f.3", "fusion", 128, 1),
    ]
    assert [x.name for x in hlo_text.moved_bytes(PROGRAM, 64)] == ["copy.2", "f.1", "f.3", "small"]


def test_calls_of_launches():
    calls = hlo_text.count_calls(PROGRAM)
    assert calls.counts.keys() >= {"f.1", "f.2", "f.3", "small", "toy.1", "copy.2"}
    assert not calls.counts.keys() & {"x", "view", "ahead", "w", "o", "joined"}
    # From 2 to below 7.
    assert calls.counts["copy.2"] == 5
    assert calls.counts["f.1"] == 1
    assert calls.fingerprints["f.1"] == calls.fingerprints["f.3"] != calls.fingerprints["f.2"]
    assert calls.unknown_loops == []
    assert hlo_text.count_calls(PROGRAM.replace("direction=LT", "direction=NE")).unknown_loops == ["w"]
    assert hlo_text.kernel_vmem(PROGRAM) == {"toy.1": 65536}


def last_words(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        bundles.main(arguments)
    if isinstance(stopped.value.code, str):
        return stopped.value.code
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_an_unknown_topology_names_the_known_ones(capsys):
    said = last_words(["--topology", "v7"], capsys)
    assert "got 'v7'" in said
    assert all(name in said for name in tpu_compiler.TOPOLOGIES)
    assert tpu_compiler.topology_name("v5e:4x4") == "v5e:4x4"
    assert tpu_compiler.topology_name("v5e") == "v5e:1x1"


def test_without_libtpu_one_line_says_where_it_comes_from(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu.so"))
    assert tpu_compiler.find_libtpu() is None
    said = last_words([], capsys)
    assert "\n" not in said
    assert str(tmp_path) in said
    assert "Linux" in said or "make tpu-compiler" in said


@pytest.fixture(scope="module")
def v6e(libtpu, tmp_path_factory):
    names = ("rolled", "unrolled", "transposed", "backward")
    return tpu_compiler.run_worker([toy.__file__, "v6e", *names], tmp_path_factory.mktemp("dump"))


STEPS = toy.ROWS * toy.COLUMNS


def test_a_rolled_loop_counts_as_its_unrolled_form(v6e):
    rolled, unrolled = v6e["rolled"], v6e["unrolled"]
    assert rolled["names"] == unrolled["names"] == ["toy.1"]
    assert rolled["assumptions"] == rolled["warnings"] == []
    # One tanh a register and turn: the trip counts are exact.
    assert rolled["tanh"] == unrolled["tanh"] == [STEPS * toy.TURNS * toy.REGISTERS]
    assert unrolled["static"][0] > 4 * rolled["static"][0]
    print(rolled["bundles"], unrolled["bundles"])
    assert rolled["bundles"][0] == pytest.approx(unrolled["bundles"][0], rel=0.04)
    # Two buffers for each window of bfloat16, a float32 accumulator.
    window = 2 * 2 * toy.SIZE * toy.SIZE
    expected = {"input windows": 2 * window, "output windows": window, "scratch operand": window}
    assert rolled["vmem"] == [expected]
    assert sum(expected.values()) <= rolled["vmem_bytes"][0] < 2 * sum(expected.values())


def test_a_copy_before_the_kernel_is_seen(v6e):
    size = 2 * toy.BLOCKS * toy.SIZE * toy.SIZE
    assert v6e["rolled"]["moved"] == []
    assert [x[2:] for x in v6e["transposed"]["moved"]] == [[size, 1]]


def test_the_backward_pass_is_alone(v6e):
    assert len(v6e["backward"]["names"]) == 1
    assert v6e["backward"]["bundles"] == v6e["rolled"]["bundles"]


def test_two_cores_of_a_chip_do_the_work_once(libtpu, tmp_path):
    rolled = tpu_compiler.run_worker([toy.__file__, "v5p", "rolled"], tmp_path)["rolled"]
    assert rolled["cores"] == [2]
    assert rolled["busiest_core"] == [rolled["bundles"][0] // 2]
    assert rolled["tanh"] == [STEPS * toy.TURNS * toy.REGISTERS]


def test_the_command_on_the_op(libtpu, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(bundles.SHAPES, "tpu_profile", Shape(1, 32, 1, 2, 8, 8))
    bundles.main(["--implementation", "chunked", "--json", "--dump", str(tmp_path)])
    (report,) = json.loads(capsys.readouterr().out)
    assert report["topology"] == "v6e:1x1"
    assert report["passes"].keys() == {"forward", "backward"}
    for which, result in report["passes"].items():
        assert result["kernel_bundles_per_token_head"] == 0
        total = sum(x["bundles"] * x["calls"] for x in result["launches"])
        assert result["xla_bundles_per_token_head"] == pytest.approx(total / (32 * 2))
        assert total > 0
        assert list((tmp_path / "v6e_1x1" / which).glob("*final_bundles.txt"))
    bundles.main(["--implementation", "chunked", "--pass", "forward"])
    assert "bundles per token-head in kernels" in capsys.readouterr().out


def test_what_the_op_refuses_is_one_line(libtpu, capsys):
    said = last_words(["--implementation", "mosaic", "--pass", "forward"], capsys)
    assert "implementation must be None or one of" in said
    assert "\n" not in said
