"""The language model: embedding, scanned pre-norm blocks of mixer and SwiGLU MLP, readout."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gdn_jax.array_types import SEEN_ONLY, Logits, SegmentIds, Tap, Tokens, no_tap
from gdn_jax.config import REMAT_POLICIES, GDNConfig
from gdn_jax.layers import ParamMaker, RMSNorm, SwiGLU, unit_normal, wide_matmul
from gdn_jax.mixer import GatedDeltaNet
from gdn_jax.mup import axes as ax
from gdn_jax.mup.rules import Rules, resolve_rules
from gdn_jax.mup.spec import Role
from gdn_jax.params import param_specs, stack_layers
from gdn_jax.sharding import BATCH, FSDP, TIME, constrain, free_axes, lookup, parameter

# Compilation grows with the number of unrolled layers; deeper models run as a loop.
_MOST_UNROLLED = 16


class Multiplier(nnx.Variable):
    """A forward factor of the parametrization: part of the model, not trained."""


class Block(nnx.Module):
    """``x + s mixer(norm(x))``, then ``x + s mlp(norm(x))``, s the residual multiplier."""

    def __init__(self, config: GDNConfig, *, rngs: nnx.Rngs | jax.Array, rules: Rules | None = None) -> None:
        key = rngs.params() if isinstance(rngs, nnx.Rngs) else rngs
        mixer_key, mlp_key = jax.random.split(key)
        make = ParamMaker(config, mlp_key, rules)
        self.mixer_norm = RMSNorm(make, ax.EMBED, config.norm_eps)
        self.mixer = GatedDeltaNet(config, rngs=mixer_key, rules=rules)
        self.mlp_norm = RMSNorm(make, ax.EMBED, config.norm_eps)
        self.mlp = SwiGLU(make)

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        tap: Tap = no_tap,
        residual_multiplier: jax.Array | float = 1.0,
    ) -> jax.Array:
        """``x [B, T, D]`` to the same shape and dtype; arguments as :class:`GatedDeltaNet`."""
        scale = jnp.asarray(residual_multiplier, x.dtype)
        x = x + scale * self.mixer(self.mixer_norm(x), segment_ids=segment_ids, tap=tap)
        x = constrain(x, BATCH, TIME, ax.EMBED)
        x = x + scale * self.mlp(self.mlp_norm(x), tap=tap)
        return tap("residual", constrain(x, BATCH, TIME, ax.EMBED))


class GDNLanguageModel(nnx.Module):
    """Token ids to logits.

    Args:
        config: sizes and options.
        rngs: ``nnx.Rngs`` (stream ``params``), or a PRNG key.
        rules: initial scales and the logits multiplier, possibly traced; ``None``: those of
            ``config.preset``.
    """

    def __init__(self, config: GDNConfig, *, rngs: nnx.Rngs | jax.Array, rules: Rules | None = None) -> None:
        key = rngs.params() if isinstance(rngs, nnx.Rngs) else rngs
        outer_key, layers_key = jax.random.split(key)
        make = ParamMaker(config, outer_key, rules)
        self.config = config
        self.embedding = make(
            unit_normal,
            (ax.VOCAB, ax.EMBED),
            in_axes=(ax.VOCAB,),
            out_axes=(ax.EMBED,),
            role=Role.TIED_EMBEDDING if config.tie_embedding else Role.EMBEDDING,
        )
        self.layers = stack_layers(
            lambda layer_key: Block(config, rngs=layer_key, rules=rules),
            jax.random.split(layers_key, config.num_layers),
        )
        self.final_norm = RMSNorm(make, ax.EMBED, config.norm_eps)
        if config.tie_embedding:
            self.readout = None
        else:
            self.readout = make(
                unit_normal,
                (ax.EMBED, ax.VOCAB),
                in_axes=(ax.EMBED,),
                out_axes=(ax.VOCAB,),
                role=Role.READOUT,
            )
        known = rules or static_rules(self, config)
        self.logits_multiplier = Multiplier(jnp.asarray(known.logits_multiplier, jnp.float32))
        self.residual_multiplier = Multiplier(jnp.asarray(known.residual_multiplier, jnp.float32))

    def __call__(self, tokens: Tokens, segment_ids: SegmentIds | None = None) -> Logits:
        """Logits, float32, of the token after each position.

        Args:
            tokens: int32 ids below ``vocab_size``.
            segment_ids: int32 document of each position; 0 is padding. ``None``: one document a row.
        """
        return self._forward(tokens, segment_ids, None)[0]

    def with_intermediates(
        self,
        tokens: Tokens,
        segment_ids: SegmentIds | None = None,
        perturbations: Mapping[str, jax.Array] | None = None,
        summary: Callable[[jax.Array], jax.Array] | None = None,
    ) -> tuple[Logits, dict[str, jax.Array]]:
        """As ``__call__``, and every tapped value by name; those of the blocks have a leading layer axis.

        Args:
            tokens: as in ``__call__``.
            segment_ids: as in ``__call__``.
            perturbations: added to the value of that name in each block ``[L, ...]``; the gradient
                with respect to them is the gradient at that value.
            summary: what to keep of a value; all of it by default, of every layer at once.

        Raises:
            ValueError: a perturbation that would do nothing: no value of the blocks has its name, or nothing goes on
                with that value (``array_types.SEEN_ONLY``).
        """
        return self._forward(tokens, segment_ids, perturbations or {}, summary or (lambda value: value))

    def _forward(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None,
        perturbations: Mapping[str, jax.Array] | None,
        summary: Callable[[jax.Array], jax.Array] = lambda value: value,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        graphdef, layers = nnx.split(self.layers)
        perturbed: set[str] = set()

        def block(x: jax.Array, xs: tuple[Any, Mapping[str, jax.Array] | None]) -> tuple[jax.Array, Any]:
            layer, added = xs
            seen: dict[str, jax.Array] = {}

            def tap(name: str, value: jax.Array) -> jax.Array:
                if added is not None and name in added and name not in SEEN_ONLY:
                    value = value + added[name]
                    perturbed.add(name)
                seen[name] = summary(value)
                return value

            x = nnx.merge(graphdef, layer)(
                x,
                segment_ids=segment_ids,
                tap=no_tap if added is None else tap,
                residual_multiplier=self.residual_multiplier[...],
            )
            return x, seen

        embedded = constrain(lookup(self.embedding, tokens, dtype), BATCH, TIME, ax.EMBED)
        body = _rematerialised(block, config.remat)
        at_once = config.num_layers if unrolled(config.num_layers) else 1
        added_to = perturbations
        if perturbations is not None:
            added_to = {name: x for name, x in perturbations.items() if x.shape[:1] == (config.num_layers,)}
        x, seen = jax.lax.scan(body, embedded, (layers, added_to), unroll=at_once)
        if idle := (perturbations or {}).keys() - perturbed:
            raise ValueError(
                f"perturbations must be [{config.num_layers} layers, ...] and named after what the blocks go on with; "
                f"got {', '.join(sorted(idle))}. Use {', '.join(sorted(seen.keys() - SEEN_ONLY))}."
            )
        normed = self.final_norm(x)
        kernel = (
            parameter(self.embedding, dtype).T if self.readout is None else parameter(self.readout, dtype)
        )
        logits = wide_matmul(normed, kernel)
        logits = constrain(logits * self.logits_multiplier[...], BATCH, TIME, ax.VOCAB)
        if perturbations is not None:
            outer = {"embedding": embedded, "final_norm": normed, "logits": logits}
            seen |= {name: summary(value) for name, value in outer.items()}
        return logits, seen


def unrolled(num_layers: int) -> bool:
    """Whether layers are compiled one by one rather than as a loop; the values are the same.

    A loop zeroes, writes and reads stacks of what the backward pass needs. On an H100 that is 13 % of a step of four
    layers (width 512, 8,192 tokens) and half of its memory; compiling them one by one takes a tenth longer. A CPU
    compiles slowly, and along `fsdp` a loop has no more than one layer's parameters gathered at a time.
    """
    return jax.default_backend() == "gpu" and num_layers <= _MOST_UNROLLED and FSDP not in free_axes()


def _rematerialised(block: Callable, policy: str) -> Callable:
    if policy == "none":
        return block
    return jax.checkpoint(block, policy=getattr(jax.checkpoint_policies, REMAT_POLICIES[policy]))


def static_rules(model: nnx.Module, config: GDNConfig, optimizer: str | None = None) -> Rules:
    """The rules of a model of this config, as numbers.

    Args:
        model: any module whose parameters are declared, abstract or not.
        config: gives preset, sizes and base sizes.
        optimizer: one of ``mup.OPTIMIZERS``; ``None``: ``config.optimizer``.
    """
    return resolve_rules(
        param_specs(model),
        preset=config.preset,
        optimizer=optimizer or config.optimizer,
        sizes=config.axis_sizes,
        base_sizes=config.base_axis_sizes,
    )
