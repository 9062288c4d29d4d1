"""Coordinate check: measures how activations, updates and gradients scale with width. Rows only; no plotting.

Per width, seed and step: mean |x| of every tapped value (``absolute``), of its difference from
initialisation (``change``), of each parameter's effect (``update``: mean |dW x0| of a matrix on its
input at step 0, mean |dw| of the rest) and of the loss gradient at some values (``gradient``).
Means of absolute values: L2-normalised gradients are heavy-tailed under SGD. arXiv:2203.03466,
appendix D; arXiv:2606.04048, section 5.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gdn_jax import mup
from gdn_jax.config import GDNConfig
from gdn_jax.layers import gate_quantiles
from gdn_jax.model import GDNLanguageModel
from gdn_jax.mup.spec import ParamSpec
from gdn_jax.params import param_specs

GRADIENTS_AT = ("q", "v", "gate_a", "gate_b", "o")

# Adam's epsilon must not show: arXiv:2407.05872.
_CHECK_EPSILON = 1e-12


class Tokens(NamedTuple):
    """A batch: ids, what follows them, documents, and 1 where the loss counts; ``[B, T]`` each."""

    tokens: Any
    targets: Any
    segment_ids: Any
    loss_mask: Any


def measure(
    config: GDNConfig,
    *,
    preset: str,
    optimizer: str,
    learning_rate: float,
    seeds: Sequence[int],
    batches: Sequence[Tokens],
    probe: Tokens,
    at_steps: Sequence[int] = (0, 2, 10),
    momentum: float = 0.98,
    compiler_options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Trains one width without clip or decay and measures it.

    Args:
        config: the model, with its base; float32, untied.
        preset: parametrization.
        optimizer: one of ``mup.OPTIMIZERS``.
        learning_rate: at the base; a tuned optimum, since a tiny one would pass anything.
        seeds: of the initialisation; >= 3 for a standard error.
        batches: one per step.
        probe: the fixed batch on which everything is measured.
        at_steps: when to measure.
        momentum: of SGD.
        compiler_options: of XLA, as ``jax.jit`` takes them; no product is run often enough to be worth autotuning.

    Returns:
        Rows ``{preset, optimizer, width, seed, step, kind, quantity, size}``. Blocks are averaged.

    Raises:
        ValueError: fewer batches than steps, or a config that a check is not defined for.
    """
    if max(at_steps) > len(batches):
        raise ValueError(f"batches must be one per step, {max(at_steps)}; got {len(batches)}.")
    if config.compute_dtype != "float32" or config.tie_embedding:
        raise ValueError("config must be float32 with an untied embedding; use those for the check.")
    check = _check_of(config, optimizer, momentum, tuple(sorted((compiler_options or {}).items())))
    rules = jax.tree.map(
        np.float32,
        mup.resolve_rules(
            check.specs,
            preset=preset,
            optimizer=optimizer,
            sizes=config.axis_sizes,
            base_sizes=config.base_axis_sizes,
        ),
    )
    rate = np.float32(learning_rate)
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        with jax.default_matmul_precision("highest"):
            start, opt_state = check.init(np.int32(seed), rules, rate)
            params = jax.tree.map(jnp.copy, start)
            for step in range(max(at_steps) + 1):
                if step in at_steps:
                    sizes = jax.device_get(check.sizes(start, params, rules, probe))
                    rows += [
                        {
                            "preset": preset,
                            "optimizer": optimizer,
                            "width": config.width,
                            "seed": int(seed),
                            "step": step,
                            "kind": kind,
                            "quantity": quantity,
                            "size": float(size),
                        }
                        for kind, by_quantity in sizes.items()
                        for quantity, size in by_quantity.items()
                        if step > 0 or kind in ("absolute", "gradient")
                    ]
                if step < max(at_steps):
                    params, opt_state = check.step(params, opt_state, rules, rate, batches[step])
    return rows


class _Check(NamedTuple):
    specs: Any
    init: Any
    step: Any
    sizes: Any


@functools.lru_cache(maxsize=1)
def _check_of(
    config: GDNConfig, optimizer: str, momentum: float, compiler_options: tuple[tuple[str, Any], ...] = ()
) -> _Check:
    """The jitted functions of one width; they serve every preset and seed."""
    abstract = nnx.eval_shape(lambda: GDNLanguageModel(config, rngs=jax.random.key(0)))
    graphdef = nnx.graphdef(abstract)
    specs = param_specs(abstract)
    jit = functools.partial(jax.jit, compiler_options=dict(compiler_options))

    def transform(rate: Any, rules: mup.Rules) -> optax.GradientTransformation:
        if optimizer == "adamw":
            return mup.adamw(rate, specs, rules, eps=_CHECK_EPSILON, clip_norm=None)
        if optimizer == "muon":
            return mup.muon(rate, specs, rules, eps=_CHECK_EPSILON, clip_norm=None)
        return mup.sgd(rate, specs, rules, momentum=momentum, clip_norm=None)

    def model_of(params: Any, rules: mup.Rules) -> GDNLanguageModel:
        constants = nnx.State(
            {
                "logits_multiplier": rules.logits_multiplier,
                "residual_multiplier": rules.residual_multiplier,
            }
        )
        return nnx.merge(graphdef, nnx.State(params), constants)

    def mean_loss(logits: jax.Array, batch: Tokens) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        mask = jnp.asarray(batch.loss_mask, jnp.float32)
        return jnp.sum(losses * mask) / jnp.sum(mask)

    @jit
    def init(seed: jax.Array, rules: mup.Rules, rate: jax.Array) -> tuple[Any, Any]:
        model = GDNLanguageModel(config, rngs=jax.random.key(seed), rules=rules)
        # The base's quantiles, repeated: sampling noise of few heads, or a finer grid, looks like a slope in width.
        heads = (config.base or config).num_value_heads
        decay_log, bias = (jnp.tile(x, config.num_value_heads // heads) for x in gate_quantiles(heads))
        shape = (config.num_layers, config.num_value_heads)
        model.layers.mixer.A_log[...] = jnp.broadcast_to(decay_log[None], shape)
        model.layers.mixer.dt_bias[...] = jnp.broadcast_to(bias[None], shape)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return params, transform(rate, rules).init(params)

    # Given away: at width 4,096 each of them is gigabytes.
    @functools.partial(jit, donate_argnums=(0, 1))
    def step(
        params: Any, opt_state: Any, rules: mup.Rules, rate: jax.Array, batch: Tokens
    ) -> tuple[Any, Any]:
        def loss(params: Any) -> jax.Array:
            return mean_loss(model_of(params, rules)(batch.tokens, batch.segment_ids), batch)

        updates, opt_state = transform(rate, rules).update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @jit
    def sizes(start: Any, params: Any, rules: mup.Rules, probe: Tokens) -> dict[str, dict[str, jax.Array]]:
        def forward(params: Any, added: Any = None) -> tuple[jax.Array, dict[str, jax.Array]]:
            return model_of(params, rules).with_intermediates(probe.tokens, probe.segment_ids, added)

        _, before = forward(start)
        _, now = forward(params)
        added = {name: jnp.zeros_like(now[name]) for name in GRADIENTS_AT}
        grads = jax.grad(lambda added: mean_loss(forward(params, added)[0], probe))(added)
        shown = [name for name in now if name not in INPUTS]
        delta = jax.tree.map(jnp.subtract, params, start)
        return {
            "absolute": {name: _mean_abs(now[name]) for name in shown},
            "change": {name: _mean_abs(now[name] - before[name]) for name in shown},
            "update": update_sizes(delta, specs, before, probe.tokens),
            "gradient": {name: _mean_abs(grad) for name, grad in grads.items()},
        }

    return _Check(specs, init, step, sizes)


def _mean_abs(x: jax.Array) -> jax.Array:
    return jnp.mean(jnp.abs(x))


# Tapped as inputs of matrices, not as quantities of their own.
INPUTS = ("mixer_input", "mixer_hidden", "mlp_input", "mlp_hidden")

# Input of each matrix; this module knows the language model it measures.
_INPUT_OF = {
    ("layers", "mixer", "q", "kernel"): "mixer_input",
    ("layers", "mixer", "k", "kernel"): "mixer_input",
    ("layers", "mixer", "v", "kernel"): "mixer_input",
    ("layers", "mixer", "g", "kernel"): "mixer_input",
    ("layers", "mixer", "a", "kernel"): "mixer_input",
    ("layers", "mixer", "b", "kernel"): "mixer_input",
    ("layers", "mixer", "o", "kernel"): "mixer_hidden",
    ("layers", "mlp", "gate", "kernel"): "mlp_input",
    ("layers", "mlp", "up", "kernel"): "mlp_input",
    ("layers", "mlp", "down", "kernel"): "mlp_hidden",
    ("readout",): "final_norm",
}


def update_sizes(
    delta: Any,
    specs: Any,
    before: dict[str, jax.Array],
    tokens: jax.Array,
    mean: Callable[[jax.Array, bool], jax.Array] = lambda x, _: _mean_abs(x),
) -> dict[str, jax.Array]:
    """What each parameter's change does: mean |dW x0| of a matrix, of the rest mean |dw|.

    Args:
        delta: change of the parameters, a nested dict.
        specs: their declarations.
        before: tapped values at the start, which x0 is taken from.
        tokens: ``[B, T]`` of the batch that ``before`` comes from.
        mean: of an array, told whether its leading axis is that of the layers; all of it by default.
    """
    flat = nnx.traversals.flatten_mapping(delta)
    flat_specs = nnx.traversals.flatten_mapping(specs)
    sizes = {}
    for path, change in flat.items():
        spec: ParamSpec = flat_specs[path]
        name = "/".join(path)
        if path == ("embedding",):
            # On its input: the rows of the probe's tokens.
            sizes[name] = mean(change[tokens], False)
        elif path in _INPUT_OF:
            x = before[_INPUT_OF[path]]
            # Fold heads and head dims: [.., B, T, in] by [.., in, out].
            lead = 1 if spec.axes[0] == "layers" else 0
            width = int(np.prod(change.shape[lead : lead + len(spec.in_axes)]))
            kernel = change.reshape(*change.shape[:lead], width, -1)
            effect = jnp.einsum("...bti,...io->...bto", x.reshape(*x.shape[: lead + 2], width), kernel)
            sizes[name] = mean(effect, lead == 1)
        else:
            sizes[name] = mean(change, spec.axes[0] == "layers")
    return sizes
