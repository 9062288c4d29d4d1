"""Rows of sweeps whose truth is planted, for the tests of the report."""

import json

import numpy as np

WIDTHS = (64, 128, 256)
BASE_OPTIMUM = -7.3


def row(**changes):
    return {
        "preset": "mup",
        "optimizer": "adamw",
        "regime": "heads",
        "width": 64,
        "learning_rate": 2.0**-7,
        "seed": 0,
        "steps": 400,
        "tokens": 819_200,
        "val_loss": 4.0,
        "diverged_at_step": None,
        "config_fingerprint": "f0",
        "code_version": "v1",
        "base_width": 64,
    } | changes


def basin(
    preset, shift, *, widths=WIDTHS, grid=(-11.0, -5.0), seeds=1, noise=0.0, diverged_above=np.inf, step=0.5
):
    """A parabola per width, its minimum `shift` octaves further at each doubling; noise by seed and run."""
    rows = []
    for index, width in enumerate(widths):
        optimum = BASE_OPTIMUM + shift * np.log2(width / widths[0])
        for log2_x in np.arange(grid[0], grid[1] + 1e-9, step):
            for seed in range(seeds):
                own = np.random.default_rng([width, seed]).normal()
                run = np.random.default_rng([width, seed, round(log2_x * 100) + 2000, len(preset)]).normal()
                loss = 4 - 0.2 * index + 0.05 * (log2_x - optimum) ** 2 + noise * (own + 0.3 * run)
                lost = log2_x > diverged_above
                rows.append(
                    row(
                        preset=preset,
                        width=width,
                        learning_rate=float(2**log2_x),
                        seed=seed,
                        val_loss=None if lost else float(loss),
                        diverged_at_step=30 if lost else None,
                    )
                )
    return rows


def half_octaves(*losses):
    """One width's rows, from 2^-8 on."""
    return [row(learning_rate=2.0 ** (-8 + i / 2), val_loss=loss) for i, loss in enumerate(losses)]


def ledger(directory, rows):
    directory.mkdir(exist_ok=True)
    (directory / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return directory
