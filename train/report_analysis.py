"""Where the optimal learning rate lies at each width of a sweep, how far it moves, and what that costs.

"Learning rate" stands for whatever the figure is drawn against: `vary.abscissa` says what that is.

- **LR*(n)**: the minimum of a quadratic in log2 of the learning rate, fitted to the seed means of the points
  within an octave of the best one. It takes at least 5 points, 2 of them on each side of the best one and of the
  minimum. Where the minimum is not bracketed there is no optimum: null and a reason, never a number.
- A learning rate at which **any** seed diverged counts as diverged. One above the best at which any seed ends half
  a nat worse than at the best has blown up, too: it is drawn, and not fitted.
- **Drift**: least-squares slope of log2 LR* on log2 width (octaves per doubling), over all swept widths or none.
- **Regret**: loss of the run at the widest width whose learning rate is nearest to LR*(base), and at most
  half an octave from it, minus the fitted minimum there.
- **Intervals** (95 %) resample the seeds jointly over learning rates, and over widths that have as many seeds,
  refitting the same points; they need 5 seeds. Percentiles are widened for few seeds (expanded percentile interval:
  Hesterberg, "What teachers should know about the bootstrap", 2015): plain ones of 5 seeds are a third too narrow.
  Seeds share the order of the data, so an interval says nothing about other data.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from train.vary import LEARNING_RATE, WORDS, abscissa, series, varied_names, with_all_values

MIN_POINTS = 5
MIN_SIDE = 2
MIN_SEEDS = 5
# Learning rates are often typed with two digits, which moves them by 0.03 octave as a rule.
OCTAVE = 1.05
# The grid's step: what a sweep can tell apart, and how near a run must be to stand for a learning rate.
RESOLUTION = 0.5
# Nats above the same seed's run at the best value. Within an octave of it losses differ by 0.05 to 0.3 nats; a run that
# blew up and ended in a number pulls the quadratic, and with it the regret, as far below all that ran as a fifth of a
# nat. Two of five, whose mean is a quarter of a nat up, did so by 0.02.
BLOWN_UP = 0.5
# Widths up to here are too narrow for the limit that the theory describes: no proxy is named among them.
NOT_ASYMPTOTIC = 64
RESAMPLES = 10_000
RESAMPLING_SEED = 0
# More resamples than this without a minimum, and the quantile of the others would flatter.
LOST_RESAMPLES = 0.01


@dataclasses.dataclass(frozen=True)
class Curve:
    """Loss against the abscissa at one width of one preset; its values (log2) ascend."""

    log2_x: np.ndarray
    # Seed means in nats, seed effects taken out where the learning rates have different seeds.
    loss: np.ndarray
    # Per learning rate: seed -> loss.
    by_seed: list[dict[int, float]]
    # log2 of the values at which any seed diverged.
    diverged: list[float]
    # The abscissa, as sentences call it.
    what: str = WORDS[LEARNING_RATE]


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The fitted minimum of a curve, or the reason why there is none."""

    log2_x: float | None = None
    minimum: float | None = None
    fit_rms: float | None = None
    reason: str | None = None
    # Not bracketed: the best point ends the curve, or the fit has no minimum among its points.
    edge: bool = False
    # -1: it lies below the grid, +1: above, 0: neither or unknown.
    side: int = 0
    # Indices into the curve of the points fitted, and the seeds that all of them have.
    window: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()


def power_of_two(log2: float) -> str:
    """`-8.5` as `2^-8.5`, two decimals at most."""
    return f"2^{round(log2, 2):g}"


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Curve]]:
    """The rows of one sweep as a `Curve` per preset and width, both in ascending order.

    Where more than the learning rate was varied, every combination of a preset and the values that are not the
    abscissa counts as a preset of its own.
    """
    rows = with_all_values(rows)
    against, varied = abscissa(rows), varied_names(rows)
    grouped: dict[str, dict[int, dict[float, dict[int, float | None]]]] = {}
    # Values in the order of numbers: 4 before 16.
    named = ["preset", *(name for name in (*varied, LEARNING_RATE) if name != against)]
    for row in sorted(rows, key=lambda row: [row[name] for name in named]):
        points = grouped.setdefault(series(row, against, varied), {}).setdefault(row["width"], {})
        points.setdefault(round(math.log2(row[against]), 9), {})[row["seed"]] = row["val_loss"]
    return {
        preset: {
            width: _curve(preset, width, points, WORDS[against]) for width, points in sorted(widths.items())
        }
        for preset, widths in grouped.items()
    }


def _curve(preset: str, width: int, points: Mapping[float, Mapping[int, float | None]], what: str) -> Curve:
    finite, diverged = [], []
    for log2_x, losses in sorted(points.items()):
        kept = {seed: loss for seed, loss in sorted(losses.items()) if loss is not None}
        if len(kept) < len(losses):
            diverged.append(log2_x)
        else:
            finite.append((log2_x, kept))
    by_seed = [kept for _, kept in finite]
    try:
        loss = _seed_means(by_seed, what)
    except ValueError as error:
        raise ValueError(f"{preset}, width {width}: {error}") from None
    return Curve(np.array([log2_x for log2_x, _ in finite]), loss, by_seed, diverged, what)


def _seed_means(by_seed: Sequence[Mapping[int, float]], what: str) -> np.ndarray:
    """Mean over the seeds per learning rate; two-way least squares where these have different seeds.

    With 5 seeds near the optimum and one elsewhere, plain means would compare a lucky seed with an average.
    """
    if all(losses.keys() == by_seed[0].keys() for losses in by_seed):
        return np.array([np.mean(list(losses.values())) for losses in by_seed])
    # A run that blew up says nothing of its seed; what it lost must not be charged to the seed elsewhere.
    steady = list(by_seed)
    while True:
        effects = _seed_effects(steady, what)
        spreads = [np.ptp([loss - effects[seed] for seed, loss in losses.items()]) for losses in steady]
        if max(spreads) <= BLOWN_UP:
            break
        del steady[int(np.argmax(spreads))]
    return np.array(
        [np.mean([loss - effects.get(seed, 0.0) for seed, loss in losses.items()]) for losses in by_seed]
    )


def _seed_effects(by_seed: Sequence[Mapping[int, float]], what: str) -> dict[int, float]:
    """What each seed adds to the loss, by least squares beside what each learning rate does; they add up to 0."""
    seeds = sorted(set().union(*by_seed))
    design, target = [], []
    for index, losses in enumerate(by_seed):
        for seed, loss in losses.items():
            row = np.zeros(len(by_seed) + len(seeds) - 1)
            row[index] = 1.0
            if seed == seeds[-1]:
                row[len(by_seed) :] = -1.0
            else:
                row[len(by_seed) + seeds.index(seed)] = 1.0
            design.append(row)
            target.append(loss)
    fitted, _, rank, _ = np.linalg.lstsq(np.array(design), np.array(target))
    if rank < fitted.size:
        raise ValueError(
            f"some {what}s share no seed with the others, so their losses cannot be compared; "
            f"run one seed at every {what}"
        )
    of_seeds = fitted[len(by_seed) :].tolist()
    return dict(zip(seeds, [*of_seeds, -sum(of_seeds)], strict=True))


def _vertex(log2_x: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minima of quadratics fitted to `losses` `[resamples, points]`: (place, value), or NaN."""
    centre = log2_x.mean()
    c0, c1, c2 = np.linalg.pinv(np.vander(log2_x - centre, 3, increasing=True)) @ losses.T
    # A parabola flatter than rounding is no parabola.
    convex = c2 > 1e-9
    safe = np.where(convex, c2, 1.0)
    place, value = centre - c1 / (2 * safe), c0 - c1**2 / (4 * safe)
    inside = convex & (place >= log2_x[0]) & (place <= log2_x[-1])
    return np.where(inside, place, np.nan), np.where(inside, value, np.nan)


def find_optimum(curve: Curve) -> Optimum:
    """LR* of one curve, as the module's docstring defines it."""
    x, loss = curve.log2_x, curve.loss
    if not x.size:
        return Optimum(reason=f"every {curve.what} diverged", edge=True, side=-1)
    best = int(np.argmin(loss))
    place = power_of_two(x[best])
    if best == x.size - 1 and any(d > x[best] for d in curve.diverged):
        reason = (
            f"the best {curve.what}, {place}, is the largest that did not diverge: no minimum is bracketed"
        )
        return Optimum(reason=reason, edge=True, side=1)
    if best in (0, x.size - 1):
        end, beyond, side = ("lowest", "below", -1) if best == 0 else ("highest", "above", 1)
        reason = f"the best {curve.what}, {place}, is the {end} that was run: extend the grid {beyond} it"
        return Optimum(reason=reason, edge=True, side=side)
    near = np.abs(x - x[best]) <= OCTAVE
    at_best = {seed: float(loss[best]) for point in curve.by_seed for seed in point} | curve.by_seed[best]
    worse = [max(nats - at_best[seed] for seed, nats in point.items()) for point in curve.by_seed]
    blown_up = near & (x > x[best]) & (np.array(worse) > BLOWN_UP)
    window = tuple(int(i) for i in np.flatnonzero(near & ~blown_up))
    below, above = sum(i < best for i in window), sum(i > best for i in window)
    if len(window) < MIN_POINTS or min(below, above) < MIN_SIDE:
        lost = sum(abs(d - x[best]) <= OCTAVE for d in curve.diverged) + int(np.sum(blown_up))
        reason = (
            f"within an octave of the best {curve.what}, {place}, there are {below} below it and {above} "
            f"above{f' (not counting {lost} that diverged or blew up)' if lost else ''}; a fit takes {MIN_SIDE} on "
            f"each side, {MIN_POINTS} in all: {'use a finer grid' if lost else 'add half-octave ones'} there"
        )
        return Optimum(reason=reason, window=window)
    fitted = x[list(window)]
    vertex, minimum = (float(a[0]) for a in _vertex(fitted, loss[None, list(window)]))
    if math.isnan(vertex):
        reason = f"the quadratic around {place} has no minimum among its points: too flat or too noisy"
        return Optimum(reason=reason, edge=True, window=window)
    if (beyond := min(int(np.sum(fitted < vertex)), int(np.sum(fitted > vertex)))) < MIN_SIDE:
        reason = (
            f"the quadratic around {place} has its minimum at {power_of_two(vertex)}, and {beyond} of its points "
            "beyond: too flat or too noisy; run quarter-octave ones on that side, or more seeds"
        )
        return Optimum(reason=reason, window=window)
    residual = loss[list(window)] - np.polyval(
        np.polyfit(fitted - vertex, loss[list(window)], 2), fitted - vertex
    )
    seeds = set.intersection(*(set(curve.by_seed[i]) for i in window))
    return Optimum(
        vertex, minimum, float(np.sqrt(np.mean(residual**2))), None, False, 0, window, tuple(sorted(seeds))
    )


def _resampled_means(curve: Curve, points: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
    """Means over resampled seeds `[RESAMPLES, points]`; as many seeds give equal draws at every width."""
    rng = np.random.default_rng(RESAMPLING_SEED)
    draws = rng.integers(0, len(seeds), (RESAMPLES, len(seeds)))
    losses = np.array([[curve.by_seed[i][seed] for i in points] for seed in seeds])
    return losses[draws].mean(axis=1)


def resampled_optimum(curve: Curve, optimum: Optimum) -> tuple[np.ndarray, np.ndarray] | None:
    """(places, minima) of resamples of the seeds, NaN where one has none; None where there are too few seeds.

    Curves with as many seeds are resampled alike: differences of their draws are those of one resample.
    """
    if optimum.log2_x is None or len(optimum.seeds) < MIN_SEEDS:
        return None
    means = _resampled_means(curve, optimum.window, optimum.seeds)
    return _vertex(curve.log2_x[list(optimum.window)], means)


def _kept(draws: np.ndarray) -> np.ndarray | None:
    kept = draws[~np.isnan(draws)]
    return kept if kept.size >= (1 - LOST_RESAMPLES) * draws.size else None


def standard_error(draws: np.ndarray, seeds: int) -> float | None:
    """Of bootstrap draws, or None where too many have no value."""
    if (kept := _kept(draws)) is None:
        return None
    # A bootstrap's variance is short by (seeds - 1) / seeds.
    return float(np.std(kept) * math.sqrt(seeds / (seeds - 1)))


def interval(draws: np.ndarray, seeds: int) -> list[float] | None:
    """95 % expanded percentile interval of bootstrap draws, or None where too many have no value."""
    if (kept := _kept(draws)) is None:
        return None
    tail = stats.norm.cdf(math.sqrt(seeds / (seeds - 1)) * stats.t.ppf(0.025, seeds - 1))
    low, high = np.quantile(kept, [tail, 1 - tail])
    return [float(low), float(high)]


def analyse_preset(widths: Mapping[int, Curve], base_width: int) -> dict[str, Any]:
    """One preset's part of `report.json`; `widths` ascends."""
    optima = {width: find_optimum(curve) for width, curve in widths.items()}
    # Resampled places of the optimum, per width that has one and 5 seeds.
    draws: dict[int, np.ndarray] = {}
    for width, optimum in optima.items():
        if (resampled := resampled_optimum(widths[width], optimum)) is not None:
            draws[width] = resampled[0]
    base = base_width if base_width in widths else min(widths)
    result: dict[str, Any] = {
        "base_width": base,
        "optimum_log2_x": {str(w): o.log2_x for w, o in optima.items()},
        "interval": {
            str(w): interval(draws[w], len(optima[w].seeds)) if w in draws else None for w in optima
        },
        "reason": {str(w): o.reason for w, o in optima.items()},
        "minimum_nats": {str(w): o.minimum for w, o in optima.items()},
        "fit_rms_nats": {str(w): o.fit_rms for w, o in optima.items()},
        "fit_seeds": {str(w): len(o.seeds) for w, o in optima.items()},
        "best_run": {str(w): _best_run(curve) for w, curve in widths.items()},
        "diverged_log2_x": {str(w): curve.diverged for w, curve in widths.items()},
        "edge_minima": [w for w, o in optima.items() if o.edge],
        "edge_side": {str(w): o.side for w, o in optima.items() if o.edge},
    }
    result |= _drift(optima, draws, base)
    result |= _regret(widths, optima, base)
    # Whether one learning rate serves all widths at the grid's resolution; null where an optimum is missing.
    places = [optimum.log2_x for optimum in optima.values() if optimum.log2_x is not None]
    result["transfers"] = None
    if result["regret_diverged"]:
        result["transfers"] = False
    elif len(places) == len(optima) >= 2:
        start = result["optimum_log2_x"][str(base)]
        result["transfers"] = max(abs(place - start) for place in places) <= RESOLUTION
    result["proxy_from_width"] = _proxy_from_width(optima)
    return result


def _best_run(curve: Curve) -> dict[str, float] | None:
    if not curve.loss.size:
        return None
    best = int(np.argmin(curve.loss))
    return {"log2_x": float(curve.log2_x[best]), "loss_nats": float(curve.loss[best])}


def _drift(optima: Mapping[int, Optimum], draws: Mapping[int, np.ndarray], base: int) -> dict[str, Any]:
    nothing = {"drift_octaves_per_doubling": None, "drift_interval": None, "shift_octaves": None}
    places = {width: optimum.log2_x for width, optimum in optima.items() if optimum.log2_x is not None}
    missing = [width for width in optima if width not in places]
    if missing:
        return nothing | {"drift_reason": f"no optimum at width {', '.join(map(str, missing))}"}
    if len(optima) < 2:
        return nothing | {"drift_reason": "one width only"}
    doublings = np.log2(np.array(list(optima)))
    weights = (doublings - doublings.mean()) / np.sum((doublings - doublings.mean()) ** 2)
    bounds, reason = None, f"no interval: fewer than {MIN_SEEDS} seeds at some width"
    if draws.keys() == optima.keys():
        fewest = min(len(optimum.seeds) for optimum in optima.values())
        bounds = interval(weights @ np.stack(list(draws.values())), fewest)
        reason = None if bounds else "no interval: some resamples of the seeds have no minimum"
    return {
        "drift_octaves_per_doubling": float(weights @ np.array(list(places.values()))),
        "drift_interval": bounds,
        "shift_octaves": places[max(optima)] - places[base],
        "drift_reason": reason,
    }


def _regret(widths: Mapping[int, Curve], optima: Mapping[int, Optimum], base: int) -> dict[str, Any]:
    widest = max(widths)
    curve, optimum, asked = widths[widest], optima[widest], optima[base].log2_x
    out: dict[str, Any] = {
        "regret_nats": None,
        "regret_standard_error": None,
        "regret_diverged": False,
        "regret_reason": None,
        "regret_run": None,
    }
    if widest == base:
        return out | {"regret_reason": "one width only"}
    if asked is None:
        return out | {"regret_reason": f"no optimum at the base width {base}"}
    # Ties go to the lower learning rate.
    nearest = min(sorted([*curve.log2_x.tolist(), *curve.diverged]), key=lambda log2_x: abs(log2_x - asked))
    distance = nearest - asked
    run = {"width": widest, "log2_x": nearest, "value": 2.0**nearest, "distance_octaves": distance}
    out["regret_run"] = run
    if abs(distance) > RESOLUTION:
        reason = (
            f"no run at width {widest} within half an octave of {power_of_two(asked)}; "
            f"the nearest is {power_of_two(nearest)}"
        )
        return out | {"regret_reason": reason}
    if nearest in curve.diverged:
        return out | {
            "regret_diverged": True,
            "regret_reason": f"the run at {power_of_two(nearest)} diverged",
        }
    index = curve.log2_x.tolist().index(nearest)
    run["loss_nats"] = float(curve.loss[index])
    if optimum.minimum is None:
        return out | {"regret_reason": f"no optimum at width {widest}"}
    out["regret_nats"] = float(curve.loss[index]) - optimum.minimum
    if len(optimum.seeds) >= MIN_SEEDS and set(optimum.seeds) <= curve.by_seed[index].keys():
        means = _resampled_means(curve, (*optimum.window, index), optimum.seeds)
        draws = means[:, -1] - _vertex(curve.log2_x[list(optimum.window)], means[:, :-1])[1]
        out["regret_standard_error"] = standard_error(draws, len(optimum.seeds))
    return out


def _proxy_from_width(optima: Mapping[int, Optimum]) -> int | None:
    """Smallest width above 64 whose LR* lies within half an octave of that of every wider width."""
    places = [(width, optimum.log2_x) for width, optimum in optima.items()]
    for index, (width, own) in enumerate(places[:-1]):
        wider = [place for _, place in places[index + 1 :]]
        if width <= NOT_ASYMPTOTIC or own is None:
            continue
        if all(place is not None and abs(own - place) <= RESOLUTION for place in wider):
            return width
    return None


def trusted_from(preset: Mapping[str, Any]) -> int | None:
    """Width from which on the optimum stays, for a preset of a report whose base's does not transfer.

    None where fewer than two doublings of the width show it: half an octave over one of them is a drift.
    """
    width = preset["proxy_from_width"]
    if preset["transfers"] is not False or preset["regret_diverged"] or width is None:
        return None
    return width if max(map(int, preset["reason"])) >= 4 * width else None
