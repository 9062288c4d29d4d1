"""Which implementation runs, and what the public ops run of it."""

import functools
import logging
from typing import Any

from jaxtyping import Array

from kernels_pallas.gated_delta_rule import mosaic_gpu, mosaic_tpu
from kernels_pallas.gated_delta_rule.implementations import IMPLEMENTATIONS, Operands, Options
from kernels_pallas.gated_delta_rule.reference import segment_masks
from kernels_pallas.gated_delta_rule.sequence import last_id_before, split_run

_LOG = logging.getLogger("kernels_pallas")

# What has to be asked before they run: their adapter, what they are made for, and how JAX interprets them.
_KERNELS = {
    "mosaic_tpu": (mosaic_tpu, "TPUs", "tpu.force_tpu_interpret_mode"),
    "mosaic_gpu": (mosaic_gpu, "Hopper GPUs", "mosaic_gpu.force_gpu_interpret_mode"),
}


@functools.cache
def _log_choice(chosen: str, why: str) -> None:
    _LOG.info("gated_delta_rule: implementation=None takes %r: %s", chosen, why)


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError for a name that no implementation has; whether one can run here only a call knows."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {sorted(IMPLEMENTATIONS)}; got {implementation!r}. "
            "Use None for the best one that can."
        )


def choose(implementation: str | None, operands: Operands, inverse_precision: Any = None) -> str:
    """The name of the implementation that runs: the one asked for, or the best that can.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: the one asked for cannot.
    """
    check_implementation(implementation)
    if implementation in ("chunked", "reference"):
        return implementation
    q, k, v = operands.q, operands.k, operands.v
    if implementation is not None:
        kernels, made_for, interpret_mode = _KERNELS[implementation]
        if not kernels.runs_here() and not kernels.interpreted():
            raise NotImplementedError(
                f"implementation={implementation!r} runs on {made_for}; this is a {mosaic_tpu.target_platform()}. "
                f"Use None, or interpret it with jax.experimental.pallas.{interpret_mode}()."
            )
        if why_not := kernels.refusal(q, k, v, inverse_precision):
            raise NotImplementedError(f"implementation={implementation!r}: {why_not}. Use None or 'chunked'.")
        return implementation
    # Interpreted kernels must be named, since they are slow.
    for name, (kernels, made_for, _) in _KERNELS.items():
        if kernels.runs_here():
            why_not = kernels.refusal(q, k, v, inverse_precision)
            chosen = "chunked" if why_not else name
            _log_choice(chosen, f"{name}: {why_not}" if why_not else f"these are {made_for}")
            return chosen
    _log_choice("chunked", "the fastest form that runs on every platform")
    return "chunked"


def run(
    options: Options,
    operands: Operands,
    segment_ids: Array | None,
    return_final_state: bool,
    sequence_axis: str | None,
    implementation: str | None,
) -> tuple[Array, Array | None]:
    """What `gated_delta_rule` returns, of operands that were checked."""
    chosen = choose(implementation, operands, options.inverse_precision)
    implement = functools.partial(IMPLEMENTATIONS[chosen], options)
    before = None
    if sequence_axis is not None:
        implement = split_run(implement, sequence_axis, return_final_state)
        before = None if segment_ids is None else last_id_before(segment_ids, sequence_axis)
    masks = (None, None) if segment_ids is None else segment_masks(segment_ids, before)
    o, final_state = implement(operands, *masks)
    return o, final_state if return_final_state else None
