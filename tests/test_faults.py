"""The fault campaigns, a little of each; `python tests/campaigns.py` runs them whole."""

import signal
import subprocess
import sys
import time

import campaign_damage
import campaign_faults
import campaign_kill
import campaign_runs
import pytest


@pytest.fixture(scope="module", autouse=True)
def in_a_process_of_its_own():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in campaign_runs.environment().items():
            patch.setenv(name, value)
        # Compiling takes most of the time; `tests/campaigns.py` optimizes as a user does.
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
        yield


STEPS = 80


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, in_a_process_of_its_own):
    folder = tmp_path_factory.mktemp("undisturbed")
    campaign_runs.complete(campaign_runs.train_words(folder, folder / "whole", steps=STEPS))
    return folder / "whole"


@pytest.mark.slow
def test_killed_and_terminated_it_ends_with_the_same_bits(tmp_path, undisturbed):
    """One run, disturbed by both; the campaign's own driver is what `tests/campaigns.py` runs."""
    seen = campaign_kill.runs(tmp_path, 2, 1, seed=3, steps=STEPS, first=undisturbed)
    # A run that comes to its end before its second signal is followed by another one, struck twice.
    assert seen["struck"] in (2, 3)


@pytest.mark.long
def test_damaged_it_goes_on_from_the_checkpoint_before(tmp_path):
    assert campaign_damage.damages(tmp_path, 5, seed=0, resumed=1)["damages"] == 5
    # What the manifests are for: a check that cannot fail would prove nothing.
    assert campaign_damage.silent_without_manifests(tmp_path, 100, seed=0)


@pytest.mark.slow
def test_a_full_disk_costs_nothing(tmp_path, undisturbed):
    try:
        seen = campaign_faults.full_disk(tmp_path, 1, seed=2, steps=STEPS, whole=undisturbed)
    except campaign_faults.NoMountError as error:
        pytest.skip(str(error))
    assert seen["full"] == 1


@pytest.mark.long
def test_numbers_that_are_not_finite(tmp_path):
    """Each of the three kinds; `tests/test_step.py` has the parts, without a run around them."""
    assert campaign_faults.not_finite(tmp_path, 3, seed=0)["injected"] == 3


@pytest.mark.slow
def test_a_sweep_that_is_terminated_goes_on_in_the_middle_of_a_pack(tmp_path):
    seen = campaign_kill.sweep(tmp_path, 1, 0, widths=(16,), rates=3, steps=200, number=signal.SIGTERM)
    assert seen["struck"] == 1


def test_terminated_while_it_compiles(tmp_path, monkeypatch):
    """No program in the cache, and a model of many layers' cost: a handler alone would wait for the compiler."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cold"))
    out = tmp_path / "out"
    process = campaign_runs.start(campaign_runs.train_words(tmp_path, out))
    while not (out / "checkpoints").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.5)
    output, errors, _ = campaign_runs.strike(process, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "loss" not in output
    assert errors.splitlines()[-1] == "gdn: stopped by SIGTERM; the same command goes on from here"


@pytest.mark.slow
def test_a_second_start_is_refused_while_one_runs(tmp_path):
    words = campaign_runs.train_words(tmp_path, tmp_path / "out", steps=100_000)
    process = campaign_runs.start(words)
    try:
        while not (tmp_path / "out/metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        second = campaign_runs.complete(words, code=2)
        assert "is in use by another gdn process" in second.stderr
        assert second.stderr.count("\n") == 1
    finally:
        _, errors, _ = campaign_runs.strike(process, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM, errors


def test_the_campaigns_are_one_command():
    done = subprocess.run(
        [sys.executable, str(campaign_runs.ROOT / "tests/campaigns.py"), "floods"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "there is no campaign floods; choose from kill, sigterm, damage, disk, nan, sweep" in done.stderr
