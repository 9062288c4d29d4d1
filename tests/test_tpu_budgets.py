"""What the real TPU compiler makes of the kernels: budgets, nothing moved around them, shapes, pods."""

import pathlib

import pytest

from kernels_pallas.gated_delta_rule import tpu_compiler
from kernels_pallas.gated_delta_rule.shapes import SHAPES

PROGRAMS = str(pathlib.Path(__file__).with_name("tpu_programs.py"))
KERNELS = ["gated_delta_rule_backward", "gated_delta_rule_forward"]

# Bundles per token-head, bfloat16, 16 heads, by K = V: what was seen.
SEEN = {
    ("v4", 128): {"forward": 5.3, "backward": 9.7},
    ("v5e", 128): {"forward": 4.89, "backward": 7.95},
    ("v5p", 128): {"forward": 4.79, "backward": 7.75},
    ("v6e", 128): {"forward": 3.32, "backward": 5.84},
    ("tpu7x", 128): {"forward": 3.31, "backward": 5.69},
    ("v6e", 64): {"forward": 2.22, "backward": 4.33},
    ("v6e", 256): {"forward": 5.68, "backward": 10.3},
}
MARGIN = 1.05
# Percent of the load and store slots that may fill and spill registers, wherever bundles are asked for.
SPILLS = 10
# v4 has 16 MiB.
VMEM = 16 * 2**20


def _work(dim):
    """Multiplications of a token-head forward, in chunks of 128 and without the inverse."""
    return 4 * 128 * dim + 3 * dim**2


def _per_work(dim, bundles):
    """Narrow and wide heads may cost at most 1.5 times as much per multiplication as those of 128."""
    return {which: 1.5 * _work(dim) / _work(128) * most for which, most in bundles.items()}


# And what is asked for.
ASKED = {
    ("v5e", 128): {"forward": 9.0},
    ("v5p", 128): {"forward": 9.0},
    ("v6e", 128): {"forward": 6.0, "backward": 8.0},
    ("tpu7x", 128): {"forward": 6.5},
}
ASKED |= {("v6e", dim): _per_work(dim, ASKED["v6e", 128]) for dim in (64, 256)}


@pytest.fixture
def program(libtpu, tmp_path):
    def run(*words):
        return tpu_compiler.run_worker([PROGRAMS, *words], tmp_path)

    return run


def _check(program, topology, dim, *passes):
    results = program("op", topology, *(f"{which}:{dim}:{dim}:bfloat16" for which in passes))
    for which, result in zip(passes, results, strict=True):
        print(topology, dim, which, result)
        seen = SEEN[topology, dim][which]
        assert result["bundles"] <= MARGIN * seen, (topology, dim, which, result)
        # Far less, and the figure here is stale.
        assert result["bundles"] >= 0.8 * seen, (topology, dim, which, result)
        assert result["vmem"] <= VMEM
        asked = ASKED.get((topology, dim), {}).get(which)
        if asked is not None:
            assert result["bundles"] <= asked
            assert max(result["fills"], result["spills"]) <= SPILLS, (topology, dim, which, result)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.slow
def test_bundles_on_v6e(program, dim):
    _check(program, "v6e", dim, "forward", "backward")


@pytest.mark.parametrize("topology", ["v4", "v5e", "v5p", "tpu7x"])
@pytest.mark.slow
def test_bundles_elsewhere(program, topology):
    _check(program, topology, 128, "forward", *(["backward"] if topology == "v4" else []))


def test_budgets_are_within_what_is_asked_for():
    for key, passes in ASKED.items():
        assert all(MARGIN * SEEN[key][which] <= bound for which, bound in passes.items())


@pytest.mark.parametrize("topology", ["v6e", pytest.param("v4", marks=pytest.mark.long)])
def test_a_single_step_is_one_kernel_that_moves_each_state_once(program, topology):
    """In a loop that decodes; XLA's own step passes over the states twice."""
    both = program("decode", topology, "chunked", "mosaic_tpu")
    print(both)
    assert both["mosaic_tpu"]["kernels"] == ["gated_delta_step"]
    assert both["mosaic_tpu"]["moved"] == []
    assert both["mosaic_tpu"]["vmem"] <= VMEM
    (bundles,) = both["mosaic_tpu"]["bundles"]
    assert bundles + both["mosaic_tpu"]["xla"] <= 0.6 * both["chunked"]["xla"]


UNMOVED = {"kernels": KERNELS, "moved": []}


@pytest.mark.slow
def test_nothing_is_moved_around_the_op_or_in_the_mixer(program):
    names = ("narrow_heads", "train_4k")
    assert program("alone", "v6e", *names) == dict.fromkeys(names, UNMOVED)
    assert program("mixer", "v6e") == UNMOVED


@pytest.mark.long
@pytest.mark.parametrize(("topology", "dim"), SEEN)
def test_all_bundles(program, topology, dim):
    _check(program, topology, dim, "forward", "backward")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("topology", tpu_compiler.TOPOLOGIES)
def test_every_named_shape_compiles_and_nothing_is_moved(program, topology):
    around = program("alone", topology, *SHAPES)
    assert around.keys() == SHAPES.keys()
    for name, shape in SHAPES.items():
        assert around[name]["kernels"] == KERNELS, name
        # Shorter heads than the kernels have are filled with zeros.
        if shape.key_dim >= 64:
            assert around[name]["moved"] == [], name
    assert program("mixer", topology) == UNMOVED


@pytest.mark.long
@pytest.mark.parametrize("topology", tpu_compiler.TOPOLOGIES)
def test_float32_and_unequal_heads_compile(program, topology):
    cases = [
        f"{which}:{k}:{v}:float32" for which in ("forward", "backward") for k, v in ((64, 128), (256, 256))
    ]
    results = program("op", topology, *cases)
    assert all(result["vmem"] <= VMEM for result in results)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("topology", ["v5e:16x16", "v5p:8x8x8"])
def test_a_train_step_compiles_for_a_pod(program, topology):
    assert program("step", topology) == {"kernels": KERNELS, "collectives": ["all-reduce"]}
