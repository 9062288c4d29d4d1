"""kill -9 and SIGTERM at random moments: a run ends as if nothing had happened, and so does a sweep."""

import collections
import json
import random
import signal
import sys
import time

from campaign_runs import (
    EVERY,
    Moment,
    complete,
    data_words,
    digest,
    last_step,
    losses,
    phase,
    resumed_from,
    start,
    strike,
    tell,
    train_words,
)


def runs(folder, count, runs, seed, number=signal.SIGKILL, steps=200, say=tell, first=None):
    """Disturbs ``runs`` runs ``count`` times in all; every one must end with the bits of an uninterrupted one.

    ``first``: the folder of an uninterrupted one with seed 0, where there is one already.

    Returns what was seen: kills by phase, the most steps that one lost, the longest wait for an exit.
    """
    rng = random.Random(f"{seed} {number}")
    phases, most_lost, longest, struck, finished = collections.Counter(), 0, 0.0, 0, 0
    while struck < count or finished < runs:
        name = f"{signal.Signals(number).name}-{finished}"
        wanted = -(-count // runs)
        whole, out = folder / f"{name}-whole", folder / name
        # Every run has a seed of its own, so that no two have the same bits.
        words = {path: train_words(folder, path, seed=finished, steps=steps) for path in (whole, out)}
        if finished or first is None:
            complete(words[whole])
        else:
            whole = first
        reached = here = 0
        while True:
            moment, process = Moment(rng), start(words[out])
            if here == wanted or not moment.wait(process, out):
                output, errors = process.communicate()
                assert process.returncode == 0, errors
                most_lost = max(most_lost, reached - _resumed(output, steps))
                break
            doing = phase(out, reached)
            output, errors, seconds = strike(process, number)
            if process.returncode == 0:
                # It came to its end before the signal did.
                break
            here += 1
            phases[doing] += 1
            allowed = (-signal.SIGKILL,) if number == signal.SIGKILL else (128 + number, -number)
            assert process.returncode in allowed, f"exit code {process.returncode}\n{output}\n{errors}"
            lost = reached - _resumed(output, reached)
            most_lost, longest = max(most_lost, lost), max(longest, seconds)
            assert lost <= (EVERY if number == signal.SIGKILL else 0), f"{lost} steps lost\n{output}"
            if "loss" in output:
                reached = last_step(out)
        assert digest(out) == digest(whole), f"{name}: other parameters than without interruption"
        assert losses(out) == losses(whole), f"{name}: another log than without interruption"
        summaries = [json.loads((path / "summary.json").read_text()) for path in (whole, out)]
        assert summaries[0] == summaries[1]
        struck, finished = struck + here, finished + 1
        say(f"{name}: {here} times, then bit-identical; {struck} of {count} so far, {dict(phases)}")
    return {
        "signal": signal.Signals(number).name,
        "struck": struck,
        "runs": finished,
        "phases": dict(phases),
        "most_steps_lost": most_lost,
        "seconds_to_exit": round(longest, 2),
    }


def _resumed(output, otherwise):
    """The step that a process began at; ``otherwise`` where it did not come so far as to say so."""
    if "going on from" in output or "already at" in output:
        return resumed_from(output) or otherwise
    # The first line of a run that begins is its first step.
    return 0 if "step      1 " in output else otherwise


def sweep(
    folder,
    count,
    seed,
    widths=(16, 32, 48),
    rates=8,
    steps=100,
    number=signal.SIGKILL,
    say=tell,
):
    """Disturbs a sweep ``count`` times; it must end with the rows of an uninterrupted one but for timings."""
    rng = random.Random(f"{seed} sweep {number}")
    name = f"sweep-{signal.Signals(number).name}"
    words = {
        out: [
            sys.executable, "-m", "train", "sweep", "--out", str(folder / out),
            "--widths", *map(str, widths), "--presets", "mup", "--steps", str(steps),
            "--learning-rates", *(f"2^-{4 + rate}" for rate in range(rates)),
            "--model.base-width", str(widths[0]), "--model.layers", "1", "--model.key-dim", "8",
            "--model.value-dim", "16", *data_words(folder),
        ]
        for out in (f"{name}-whole", name)
    }  # fmt: skip
    complete(words[f"{name}-whole"])
    path = folder / name / "rows.jsonl"

    def done():
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    struck = 0
    while struck < count:
        # So few rows a process that the last kill comes before the last row, also where some give two.
        before, more = done(), rng.random() < 0.6 * len(widths) * rates / count
        process, delay = start(words[name]), rng.uniform(0.0, 0.1) if more else rng.uniform(0.5, 3)
        while more and process.poll() is None and done() == before:
            time.sleep(0.002)
        time.sleep(delay)
        _, errors, _ = strike(process, number)
        if process.returncode == 0:
            break
        assert process.returncode in (-number, 128 + number), errors
        struck += 1
    complete(words[name])
    whole, killed = (_rows(folder / out / "rows.jsonl") for out in words)
    assert len(whole) == len(widths) * rates
    assert whole == killed, "other rows than without interruption"
    say(f"{name}: {struck} times, then the same {len(whole)} rows")
    return {"signal": signal.Signals(number).name, "struck": struck, "rows": len(whole)}


def _rows(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]
