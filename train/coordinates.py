"""What the coordinate check measures, per layer and while a run trains; and how coherent the gates' gradients are.

The square-root rules of the gates under SGD (arXiv:2606.04048) assume that the terms which the value channels
of a head contribute to its gate's gradient add up incoherently. `coherence_exponent` measures that at one width:
doubling the channels multiplies an incoherent sum by 2^0.5 and a coherent one by 2^1.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdn_jax.mup.coord_check import INPUTS, update_sizes
from kernels_pallas import gated_delta_rule_from_gates
from train import mesh as meshes
from train.data import Batch
from train.metrics_log import MetricsLog
from train.step import HParams, Program, TrainState, quick_options

# Rows of the batch that is measured: enough for means over thousands of positions, cheap beside a step.
_ROWS = 2
# A gate this near to an end of its range has lost 4/5 of its largest slope.
_SATURATED = 0.05


def coherence_exponent(terms: jax.Array) -> jax.Array:
    """log2 of how much the sum over the last axis outgrows that over half of it (root mean squares): 0.5 to 1.

    Args:
        terms: ``[..., channels]``, an even number of them.

    Returns:
        A scalar; NaN where the terms are all zero.
    """
    halves = jnp.sum(terms.reshape(*terms.shape[:-1], 2, terms.shape[-1] // 2), axis=-1)
    whole = jnp.mean(jnp.square(jnp.sum(halves, axis=-1)))
    return 0.5 * jnp.log2(whole / jnp.mean(jnp.square(halves)))


def gate_gradient_terms(
    mixer: Any, seen: dict[str, jax.Array], do: jax.Array, segment_ids: jax.Array, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """The gradients at W_a x and W_b x of one layer, before the sum over a head's value channels.

    Columns of the state do not know of each other, so each can be a head of its own, with its own copy of the gates.

    Args:
        mixer: parameters of the layer's mixer; its gate scalars are read.
        seen: tapped values of the layer.
        do: gradient at the rule's output ``[B, T, G, V]``.
        segment_ids: ``[B, T]``.
        options: of the op.

    Returns:
        Two arrays ``[B, T, G, V]``.
    """
    v = seen["v"]
    channels = v.shape[-1]

    def outputs(a: jax.Array, b: jax.Array) -> jax.Array:
        heads = (*a.shape[:2], -1)
        return gated_delta_rule_from_gates(
            seen["q"],
            seen["k"],
            v.reshape(*heads, 1),
            a.reshape(heads),
            b.reshape(heads),
            jnp.repeat(mixer["A_log"], channels),
            jnp.repeat(mixer["dt_bias"], channels),
            segment_ids=segment_ids,
            implementation="chunked",
            **options,
        )[0]

    gates = [jnp.repeat(seen[name][..., None], channels, axis=-1) for name in ("gate_a", "gate_b")]
    _, pull = jax.vjp(outputs, *gates)
    return pull(do.astype(v.dtype).reshape(*v.shape[:2], -1, 1))


def measurement(
    program: Program, mesh: jax.sharding.Mesh, seed: int, hparams: HParams, batch: Batch
) -> Callable[[TrainState], dict[str, Any]]:
    """A function from a state to its row of the log.

    Args:
        program: of the run.
        mesh: of the run.
        seed: of its initialisation, which is made again for each row rather than kept.
        hparams: of the run.
        batch: held out, on the host, all of its rows; the first are measured, as many as devices split them over.

    Returns:
        Gives ``absolute``, ``update`` and ``gates``, each a dict of numbers; those of blocks are lists over the
        layers. ``gates``: shares of saturated beta, and per gate mean |gradient| and its `coherence_exponent`.
    """
    parts = mesh.shape[meshes.DATA] * mesh.shape[meshes.FSDP]
    rows = -(-_ROWS // parts) * parts
    places = program.state_sharding(mesh).params
    config = program.config
    options = {
        "beta_max": 2.0 if config.allow_negative_eigenvalues else 1.0,
        "scale": config.key_dim**config.readout_scale_exponent,
        "qk_norm_eps": config.qk_norm_eps,
    }

    def per_layer(x: jax.Array, layered: bool = True) -> jax.Array:
        x = jnp.abs(x.astype(jnp.float32))
        return jnp.mean(x, axis=tuple(range(1, x.ndim))) if layered else jnp.mean(x)

    def measure(params: Any, constants: Any, hparams: HParams) -> dict[str, Any]:
        tokens, targets, segment_ids, mask = (jnp.asarray(part[:rows]) for part in batch)

        def forward(params: Any, added: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
            return program.model(params, constants).with_intermediates(tokens, segment_ids, added)

        def loss(added: Any) -> jax.Array:
            logits = forward(params, added)[0]
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
            return -jnp.sum(picked * mask) / jnp.maximum(jnp.sum(mask), 1.0)

        start = jax.lax.with_sharding_constraint(program.init(jnp.int32(seed), hparams).params, places)
        before, now = forward(start)[1], forward(params)[1]
        do = jax.grad(loss)({"o": jnp.zeros_like(now["o"])})["o"]
        blocks = {name: now[name] for name in ("q", "k", "v", "gate_a", "gate_b")}
        mixer = {name: params["layers"]["mixer"][name] for name in ("A_log", "dt_bias")}
        # One layer after the other: every channel as a head takes memory.
        terms_a, terms_b = jax.lax.map(
            lambda layer: gate_gradient_terms(layer[0], layer[1], layer[2], segment_ids, **options),
            (mixer, blocks, do),
        )
        beta = now["beta"] / options["beta_max"]
        gates = {"beta_low": beta < _SATURATED, "beta_high": beta > 1 - _SATURATED}
        gates = {name: per_layer(share) for name, share in gates.items()}
        for name, terms in (("a", terms_a), ("b", terms_b)):
            gates[f"gradient_{name}"] = per_layer(jnp.sum(terms, axis=-1))
            if config.value_dim % 2 == 0:
                gates[f"coherence_{name}"] = jax.vmap(coherence_exponent)(terms)
        outer = ("embedding", "final_norm", "logits")
        return {
            "absolute": {
                name: per_layer(x, name not in outer) for name, x in now.items() if name not in INPUTS
            },
            "update": update_sizes(
                jax.tree.map(jnp.subtract, params, start), program.specs, before, tokens, per_layer
            ),
            "gates": gates,
        }

    # The largest program of a run, for a row now and then: 77 s of compilation at width 256 on an H100, with these 35 s
    # at 1024.
    jitted = jax.jit(
        meshes.in_context(mesh, measure),
        out_shardings=meshes.replicated(mesh),
        compiler_options=quick_options(mesh.devices.flat[0].platform),
    )

    def row(state: TrainState) -> dict[str, Any]:
        return jax.tree.map(_number, jax.device_get(jitted(state.params, state.constants, hparams)))

    return row


def _number(value: Any) -> Any:
    """A scalar, or the list of a layer's, with six digits; None where it is not finite."""
    if np.ndim(value):
        return [_number(one) for one in value]
    return float(f"{float(value):.6g}") if math.isfinite(float(value)) else None


class CoordinateLog:
    """Rows of what `measurement` returns, as a training run goes on."""

    def __init__(self, measure: Callable[[TrainState], dict[str, Any]], log: MetricsLog | None) -> None:
        # Every process measures, since the state may lie on the devices of all; one of them has the log.
        self._measure, self._log = measure, log

    def write(self, step: int, state: TrainState) -> None:
        """Measures a state and adds its row."""
        row = self._measure(state)
        if self._log is not None:
            self._log.write({"step": step, **row})

    def close(self) -> None:
        """Closes the file."""
        if self._log is not None:
            self._log.close()
