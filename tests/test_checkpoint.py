"""Manifests and checkpoints: damage is noticed, half a save is none, and what is kept."""

import random

import campaign_damage
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import manifest
from train.checkpoint import Checkpoints
from train.ledger import fingerprint
from train.step import TrainState

CONFIG = {"a": 1}


def _state(step):
    values = jnp.arange(3000, dtype=jnp.float32) * step
    return TrainState({"w": values}, {}, (values + 1,), jnp.int32(step), jnp.int32(-1))


def _like():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), _state(1))


def _saved(folder, *steps, **options):
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, _state(step), {"next_index": step}, CONFIG)
    checkpoints.close()
    return checkpoints


def _steps(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def _files(folder):
    (folder / "d").mkdir(parents=True)
    (folder / "ocdbt.process_1").mkdir()
    (folder / "a").write_bytes(b"one")
    (folder / "d/b").write_bytes(b"")
    (folder / "ocdbt.process_1/c").write_bytes(b"three")
    return folder


def test_a_manifest_has_a_part_of_each_process(tmp_path):
    folder = _files(tmp_path / "c")
    assert manifest.problem(folder) == "it has no manifest"
    manifest.write_part(folder, 0, 2)
    assert "1 parts of a manifest of 2" in manifest.problem(folder)
    manifest.write_part(folder, 1, 2)
    assert manifest.problem(folder) is None
    assert "ocdbt.process_1/c" in (folder / "manifest.1").read_text()
    assert "ocdbt.process_1/c" not in (folder / "manifest.0").read_text()
    (folder / "ocdbt.process_1/c").write_bytes(b"threE")
    assert "ocdbt.process_1/c is damaged" in manifest.problem(folder)
    # The share of another process.
    assert manifest.problem(folder, lambda names: names[:1]) is None


def test_waiting_for_a_part_that_never_comes_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_WAIT_S", 0.1)
    manifest.write_part(_files(tmp_path / "c"), 0, 2)
    with pytest.raises(TimeoutError, match=r"processes \[1\] wrote no manifest"):
        manifest.await_parts(tmp_path / "c", 2)


def test_sixty_damages_are_noticed(tmp_path):
    rng, seen = random.Random(5), set()
    folder = _files(tmp_path / "c")
    manifest.write_part(folder, 0, 1)
    content = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    noticed = 0
    while noticed < 60:
        if (what := campaign_damage.damage(folder, rng)) is None:
            continue
        assert manifest.problem(folder) is not None, what
        seen.add(what.partition(":")[0].partition(" in ")[0])
        noticed += 1
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            path.unlink()
        for path, before in content.items():
            path.write_bytes(before)
        assert manifest.problem(folder) is None
    assert seen == set(campaign_damage.KINDS)


def test_restored_as_saved(tmp_path):
    _saved(tmp_path, 10)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest == 10
    state, position = checkpoints.restore(10, _like())
    jax.tree.map(np.testing.assert_array_equal, state, _state(10))
    assert position == {"next_index": 10}
    assert checkpoints.config_fingerprint(10) == fingerprint(CONFIG)
    # Already there: nothing is written over.
    checkpoints.save(10, _state(11), {}, {})
    checkpoints.close()
    assert manifest.problem(tmp_path / "10") is None
    assert checkpoints.config_fingerprint(10) == fingerprint(CONFIG)


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_best=1)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.5)):
        if loss is not None:
            checkpoints.scores[step] = loss
        checkpoints.save(step, _state(step), {}, CONFIG)
    checkpoints.close()
    assert _steps(tmp_path) == [2, 4, 5]


def test_a_validation_that_was_not_finite_is_not_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, keep_best=1)
    checkpoints.scores.update({1: 3.0, 2: float("nan"), 3: 2.0})
    for step in (1, 2, 3, 4):
        checkpoints.save(step, _state(step), {"next_index": step}, CONFIG)
    checkpoints.close()
    assert _steps(tmp_path) == [3, 4]


def test_half_a_save_is_none(tmp_path):
    _saved(tmp_path, 1)
    for left in ("2.partial", "3.partial.orbax-checkpoint-tmp"):
        (tmp_path / left / "state").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest == 1
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_damaged_checkpoint_is_put_aside_with_a_warning(tmp_path):
    _saved(tmp_path, 1, 2)
    (tmp_path / "2" / "manifest.0").unlink()
    said = []
    checkpoints = Checkpoints(tmp_path, warn=said.append)
    assert checkpoints.newest == 1
    assert said == ["warning: checkpoint 2 is damaged: it has no manifest; falling back to the one before"]
    # The same step again, sound.
    checkpoints.save(2, _state(2), {}, CONFIG)
    checkpoints.close()
    assert manifest.problem(tmp_path / "2") is None
    assert (tmp_path / "2.damaged").is_dir()


def test_none_sound_is_an_error_not_a_new_beginning(tmp_path):
    _saved(tmp_path, 1)
    (tmp_path / "1" / "_CHECKPOINT_METADATA").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is sound"):
        Checkpoints(tmp_path)


def test_another_model_is_refused_in_one_line(tmp_path):
    _saved(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path)
    other = _like()._replace(params={"w": jax.ShapeDtypeStruct((3001,), jnp.float32)})
    with pytest.raises(ValueError, match=r"params\['w'\] is float32\[3000\] there") as refused:
        checkpoints.restore(1, other)
    assert "\n" not in str(refused.value)
    checkpoints.close()


def test_what_a_save_ended_with_is_raised(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_part", fail)
    checkpoints.save(1, _state(1), {}, CONFIG)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.close()
    assert checkpoints.newest is None
    assert list(tmp_path.iterdir()) == []
