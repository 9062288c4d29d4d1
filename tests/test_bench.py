"""The benchmark: its table, what it refuses, and what it says of kernels."""

import functools
import gzip
import json

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_operands import forward_and_gradients, rounded

from kernels_pallas import gated_delta_rule
from kernels_pallas.gated_delta_rule import bench, mosaic_gpu, tiling
from kernels_pallas.gated_delta_rule.costs import UNCOUNTED, launch_costs, op_costs
from kernels_pallas.gated_delta_rule.shapes import SHAPES, Shape


def test_bench_prints_a_row_per_implementation(capsys, monkeypatch):
    monkeypatch.setitem(SHAPES, "cpu", Shape(1, 20, 1, 1, 4, 4))
    bench.main(["--rounds", "1", "--threads", "0"])
    printed = capsys.readouterr().out
    for words in ("chunked", "reference", "forward + backward", "B=1  T=20"):
        assert words in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["--threads", "-1"], "--threads must be 0 or more; got -1"),
        (["--implementations", "foo"], "invalid choice: 'foo' (choose from"),
        (["--implementations", "mosaic_gpu", "--threads", "0"], "runs on Hopper GPUs; this is a cpu"),
        (["--torch-python", "no/such/python"], "--torch-python must be an interpreter; got no/such/python"),
    ],
)
def test_bench_refuses(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("parts", [1, 2])
def test_every_launch_has_its_costs(parts, monkeypatch):
    names, launch = [], mosaic_gpu._launch

    def noting(name, *args, **options):
        names.append(name)
        return launch(name, *args, **options)

    monkeypatch.setattr(mosaic_gpu, "_launch", noting)
    monkeypatch.setattr(tiling, "gpu_parts", lambda chunks, rows: parts)
    x = rounded((1, 128, 1, 1, 64, 64), "bfloat16")
    op = functools.partial(gated_delta_rule, implementation="mosaic_gpu")
    with plgpu.force_gpu_interpret_mode():
        jax.eval_shape(functools.partial(forward_and_gradients, op), x)
    counted = launch_costs(SHAPES["train_4k"])
    assert [name for name in names if name not in UNCOUNTED] == list(counted)
    assert [name for name in names if name not in counted] == ([] if parts == 1 else list(UNCOUNTED))


def test_bench_finds_kernels_in_a_profile_and_their_rates(tmp_path, capsys, monkeypatch):
    names = list(launch_costs(SHAPES["train_4k"]))
    events = [
        {"ph": "X", "name": f"{name}_mosaic_gpu_kernel", "dur": dur}
        for name in names
        for dur in (100.0, 300.0)
    ]
    trace = tmp_path / "a.trace.json.gz"
    with gzip.open(trace, "wt") as file:
        json.dump({"traceEvents": [*events, {"ph": "M", "name": "process_name"}]}, file)
    seconds = bench.launch_seconds(trace, names)
    assert seconds == pytest.approx(dict.fromkeys(names, 2e-4))
    monkeypatch.setattr(bench, "_profiled", lambda *_: seconds)
    bench._print_kernels(
        SHAPES["train_4k"], {"forward": 0.2, "both": 1.0}, {"both": tuple}, "NVIDIA H100 80GB HBM3"
    )
    lines = capsys.readouterr().out.split("\n")
    # 269 + 2 MB forward; the least is that over 3.02 TB/s.
    assert lines[2].split() == ["forward", "200", "90", "1353", "225"]
    assert lines[4].split()[:3] == ["gdn_inverse", "200", "35"]
    assert lines[8].split() == ["all", "else", "200"]


@pytest.mark.parametrize(
    ("name", "forward", "both"),
    [
        ("train_4k", 0.090, 0.247),
        ("wide_heads", 0.101, 0.366),
        ("qwen3_next", 0.137, 0.494),
        ("long_64k", 0.358, 0.986),
    ],
)
def test_the_least_time_of_the_op(name, forward, both):
    """In ms, as the kernels' acceptance was set."""
    ours, back = op_costs(SHAPES[name])
    assert ours.seconds("NVIDIA H100 80GB HBM3") == pytest.approx(1e-3 * forward, rel=0.02)
    assert (ours + back).seconds("NVIDIA H100 80GB HBM3") == pytest.approx(1e-3 * both, rel=0.02)
    assert ours.seconds("a card that nobody measured") is None
