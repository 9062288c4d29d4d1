"""Damages of the newest checkpoint: each must be noticed, and the one before restored; never a silent restore."""

import collections
import random
import shutil
import warnings

from campaign_runs import complete, digest, losses, tell, train_words

from train import manifest
from train.checkpoint import Checkpoints

KINDS = ("flip a byte", "flip a bit", "truncate", "empty", "delete", "append", "exchange", "add a file")


def damage(folder, rng):
    """Does one thing to one file; says what, or None where it would change nothing."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # Every third time the manifest itself, which is but one file of many.
    path = folder / "manifest.0" if rng.random() < 1 / 3 else rng.choice(files)
    kind, before = rng.choice(KINDS), path.read_bytes()
    after = before
    match kind:
        case "flip a byte" | "flip a bit" if before:
            at = rng.randrange(len(before))
            mask = rng.randrange(1, 256) if kind == "flip a byte" else 1 << rng.randrange(8)
            after = before[:at] + bytes([before[at] ^ mask]) + before[at + 1 :]
        case "truncate" if before:
            after = before[: rng.randrange(len(before))]
        case "empty":
            after = b""
        case "append":
            after = before + rng.randbytes(rng.randint(1, 50))
        case "exchange":
            other = rng.choice(files)
            after = other.read_bytes()
            if after != before:
                other.write_bytes(before)
        case "add a file":
            (path.parent / "extra").write_bytes(b"x")
            return f"{kind} in {path.parent.name}"
        case "delete":
            path.unlink()
            return f"{kind}: {path.name}"
    if after == before:
        return None
    path.write_bytes(after)
    return f"{kind}: {path.name}"


def damages(folder, count, seed, resumed=3, say=tell):
    """Damages copies of a finished run's newest checkpoint ``count`` times.

    Returns how many, of which kinds, and how many runs went on.
    """
    rng = random.Random(f"{seed} damage")
    run, whole = folder / "damaged", folder / "sound"
    words = train_words(folder, run, steps=60)
    complete([*words, "--stop-at", "50"])
    shutil.copytree(run, whole)
    complete(train_words(folder, whole, steps=60))
    newest, before = sorted((int(p.name) for p in (run / "checkpoints").iterdir()), reverse=True)[:2]
    expected = digest(run, before)
    kinds, done, copy = collections.Counter(), 0, folder / "copy"
    while done < count:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run / "checkpoints", copy / "checkpoints")
        what = damage(copy / "checkpoints" / str(newest), rng)
        if what is None:
            continue
        said = []
        checkpoints = Checkpoints(copy / "checkpoints", warn=said.append)
        assert checkpoints.newest == before, f"{what}: not noticed"
        assert len(said) == 1, f"{what}: no warning"
        assert f"checkpoint {newest} is damaged" in said[0]
        checkpoints.close()
        assert digest(copy, before) == expected
        kinds[what.partition(":")[0].partition(" in ")[0]] += 1
        done += 1
    for _ in range(resumed):
        # The whole way, from the command: a warning, and the end is that of a run without damage.
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        while damage(copy / "checkpoints" / str(newest), rng) is None:
            pass
        output = complete(train_words(folder, copy, steps=60)).stdout
        assert f"warning: checkpoint {newest} is damaged" in output
        assert f"going on from step {before}" in output
        assert digest(copy) == digest(whole)
        assert losses(copy) == losses(whole)
    say(f"{done} damages, all noticed: {dict(kinds)}; {resumed} runs went on to the same bits")
    return {"damages": done, "kinds": dict(kinds), "resumed": resumed}


def silent_without_manifests(folder, most, seed):
    """Whether Orbax by itself restores another content, and no word, after one of at most ``most`` flipped bytes.

    About one in six does, so that few would show nothing by chance.
    """
    rng = random.Random(f"{seed} silent")
    run, copy = folder / "damaged", folder / "copy"
    newest = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdecimal())
    expected = digest(run, newest)
    for _ in range(most):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        step = copy / "checkpoints" / str(newest)
        path = rng.choice([p for p in step.rglob("d/*") if p.stat().st_size])
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        path.write_bytes(bytes(content))
        assert manifest.problem(step) is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if digest(copy, newest) != expected:
                    return True
            except Exception:
                # It noticed: this file has a checksum of its own.
                continue
    return False
