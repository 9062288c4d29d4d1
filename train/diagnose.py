"""Where a step stopped being finite: its batch once more, in a program that looks at every value.

In the order in which numbers flow: the batch, the parameters, forward through the layers, the loss, and backward
through the layers. The first that is not finite is named. Only flags are kept of a value, so the program
needs little more memory than the step.
"""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train import mesh as meshes
from train import processes
from train.data import Batch
from train.step import Program, TrainState, token_loss

# Values of a block as they follow from each other; `tap` in gdn_jax names them.
_WITHIN_BLOCK = (
    "mixer_input", "q", "k", "v", "gate_a", "gate_b", "log_decay", "beta", "o", "state", "o_normed",
    "mixer_hidden", "mixer_output", "mlp_input", "mlp_hidden", "mlp_output", "residual",
)  # fmt: skip
_OUTSIDE = ("embedding", "final_norm", "logits")


def diagnose(
    program: Program, mesh: jax.sharding.Mesh, step: int, state: TrainState, batch: Batch
) -> dict[str, Any]:
    """Compiles and runs the diagnostic program; on all processes, where there are several.

    Args:
        program: of the run.
        mesh: of the run.
        step: number of the step, 1 for the first.
        state: as the step found it.
        batch: the step's, on the devices.

    Returns:
        A JSON-able report: ``step``; ``batch`` (its places in the stream of rows, the rows whose loss is not finite,
        the SHA-256 of its tokens); ``where`` (one of batch, parameters, forward, loss, backward, nowhere), ``layer``
        (from 0; None: outside the layers) and ``name`` of the first value that is not finite.
    """
    flags, row_losses = _jitted(mesh)(program, state, batch)
    flags = jax.device_get(flags)
    where, layer, name = _first(flags)
    rows = batch.tokens.shape[0]
    # Of several processes each has some rows only; the first says which are bad of its own.
    local = {
        index
        for shard in row_losses.addressable_shards
        for index in (shard.index[0].start or 0) + np.flatnonzero(~np.isfinite(np.asarray(shard.data)))
    }
    bad_rows = sorted({row for found in processes.gather(sorted(map(int, local))) for row in found})
    return {
        "step": step,
        "batch": {
            "places": [(step - 1) * rows, step * rows - 1],
            "rows_not_finite": bad_rows,
            "sha256_of_tokens": _digest(batch.tokens),
        },
        "where": where,
        "layer": layer,
        "name": name,
    }


def sentence(report: dict[str, Any]) -> str:
    """The report in one line."""
    places = report["batch"]["places"]
    batch = f"batch of places {places[0]} to {places[1]}"
    layer = "" if report["layer"] is None else f" of layer {report['layer']}"
    found = {
        "batch": f"{report['name']} of the batch itself is not finite",
        "parameters": f"parameter {report['name']}{layer} is not finite",
        "forward": f"the first value that is not finite is {report['name']}{layer}, in the forward pass",
        "loss": "all values are finite, but the loss is not",
        "backward": f"the first gradient that is not finite is that of {report['name']}{layer}",
        "nowhere": "run again, every value and gradient is finite: look for a faulty device",
    }[report["where"]]
    return f"step {report['step']} is not finite ({batch}): {found}"


@functools.cache
def _jitted(mesh: jax.sharding.Mesh) -> Any:
    return jax.jit(
        meshes.in_context(mesh, _flags),
        static_argnums=0,
        out_shardings=(meshes.replicated(mesh), meshes.rows_sharding(mesh)),
    )


def _flags(program: Program, state: TrainState, batch: Batch) -> tuple[dict[str, Any], jax.Array]:
    """What is finite: flags by name, per layer those of the blocks; and the loss of each row."""
    tokens, targets, segment_ids, mask = map(jnp.asarray, batch)
    config = program.config

    def finite(x: jax.Array) -> jax.Array:
        return jnp.all(jnp.isfinite(x))

    def forward(params: Any, added: jax.Array) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        model = program.model(params, state.constants)
        logits, seen = model.with_intermediates(tokens, segment_ids, {"residual": added}, finite)
        row_losses = jax.vmap(lambda *row: token_loss(*(x[None] for x in row))[0])(logits, targets, mask)
        return jnp.sum(row_losses) / jnp.maximum(jnp.sum(mask), 1.0), (seen, row_losses)

    added = jnp.zeros((config.num_layers, *tokens.shape, config.width), jnp.dtype(config.compute_dtype))
    (loss, (seen, row_losses)), (grads, at_residual) = jax.value_and_grad(forward, (0, 1), has_aux=True)(
        state.params, added
    )
    return {
        "batch": {"loss_mask": finite(mask)},
        "parameters": _of_parameters(state.params),
        "forward": seen,
        "loss": finite(loss),
        "gradients": _of_parameters(grads),
        "after_layer": jnp.all(jnp.isfinite(at_residual), axis=(1, 2, 3)),
    }, row_losses


def _of_parameters(params: Any) -> dict[str, jax.Array]:
    """Flags by path; of the layers' parameters one per layer."""
    flags = {}
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        keys = [str(getattr(key, "key", key)) for key in path]
        axes = tuple(range(1 if keys[0] == "layers" else 0, value.ndim))
        flags[".".join(keys)] = jnp.all(jnp.isfinite(value), axis=axes)
    return flags


def _first(flags: dict[str, Any]) -> tuple[str, int | None, str]:
    for name, fine in flags["batch"].items():
        if not fine:
            return "batch", None, name
    for layer, name in _bad(flags["parameters"]):
        return "parameters", layer, name
    seen = dict(flags["forward"])
    outside = {name: seen.pop(name) for name in _OUTSIDE}
    order = {name: index for index, name in enumerate(_WITHIN_BLOCK)}
    within = {name: seen[name] for name in sorted(seen, key=lambda name: order.get(name, len(order)))}
    if not outside["embedding"]:
        return "forward", None, "embedding"
    for layer, name in _bad(within):
        return "forward", layer, name
    for name in ("final_norm", "logits"):
        if not outside[name]:
            return "forward", None, name
    if not flags["loss"]:
        return "loss", None, "loss"
    return _first_backward(flags["gradients"], flags["after_layer"])


def _bad(flags: dict[str, np.ndarray]) -> list[tuple[int | None, str]]:
    """Layer and name of what is not finite, in the order of layers, then of names; what is outside them first."""
    found = []
    for place, (name, fine) in enumerate(flags.items()):
        for layer in np.flatnonzero(~np.atleast_1d(fine)):
            found.append((int(layer) if np.ndim(fine) else -1, place, name))
    return [(None if layer < 0 else layer, name) for layer, _, name in sorted(found)]


def _first_backward(gradients: dict[str, np.ndarray], after_layer: np.ndarray) -> tuple[str, int | None, str]:
    inside = sorted(
        [(-layer, name) for layer, name in _bad(gradients) if layer is not None], key=lambda found: found[0]
    )
    # Backward begins at the readout and ends at the embedding.
    outside = sorted([name for layer, name in _bad(gradients) if layer is None], key="embedding".__eq__)
    # What enters the last layer from the readout is the gradient after it.
    if not after_layer[-1]:
        return "backward", None, next((name for name in outside if name != "embedding"), "final_norm")
    entered = [layer + 1 for layer in np.flatnonzero(~after_layer)]
    if inside and -inside[0][0] >= max(entered, default=0):
        return "backward", -inside[0][0], inside[0][1]
    if entered:
        # No parameter's gradient shows it: it arose in the layer above the highest input that is not finite.
        return "backward", int(max(entered)), "residual"
    return ("backward", None, outside[0]) if outside else ("nowhere", None, "")


def _digest(tokens: Any) -> str | None:
    """SHA-256 of the tokens, int32 in order; None where other processes have some of them."""
    if not tokens.is_fully_addressable:
        return None
    return hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).hexdigest()
