"""The definition: one token after another, arXiv:2412.06464 eq. (10). Never optimised.

Everything else is judged against this file, so it shares no algebra with the chunked form: documents are
reset and padding is skipped by plain selection, and its gradients are JAX's own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# The definition is exact on every platform: no TF32 on a GPU, no bf16 pass on a TPU.
_EXACT = jax.lax.Precision.HIGHEST


def delta_step(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B G V"],
    log_decay: Float[Array, "B G"],
    beta: Float[Array, "B G"],
    state: Float[Array, "B G K V"],
) -> tuple[Float[Array, "B G V"], Float[Array, "B G K V"]]:
    """One token: README eq. (1) and (2), all in the dtype of `state`. The scale is already in `q`."""
    groups = v.shape[1] // q.shape[1]
    q_BGK, k_BGK = (jnp.repeat(x, groups, axis=1) for x in (q, k))
    state = jnp.exp(log_decay)[..., None, None] * state
    recalled_BGV = jnp.einsum("bgk,bgkv->bgv", k_BGK, state, precision=_EXACT)
    written_BGV = beta[..., None] * (v - recalled_BGV)
    state = state + k_BGK[..., None] * written_BGV[..., None, :]
    return jnp.einsum("bgk,bgkv->bgv", q_BGK, state, precision=_EXACT), state


def reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T G V"],
    log_decay: Float[Array, "B T G"],
    beta: Float[Array, "B T G"],
    initial_state: Float[Array, "B G K V"],
    valid: Bool[Array, "B T"] | None,
    reset: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T G V"], Float[Array, "B G K V"]]:
    """The gated delta rule by a scan over tokens, in the dtype of `initial_state`.

    Args:
        q: queries, normalised and scaled already.
        k: keys, normalised already.
        v: values.
        log_decay: log α ≤ 0.
        beta: write strength β.
        initial_state: the state before the first token.
        valid: False at padding, where o = 0 and the state passes; None: no padding.
        reset: True where the state is forgotten before the token; None: nowhere.

    Returns:
        o and the state after the last valid token.
    """
    dtype = initial_state.dtype
    batch, length = v.shape[:2]
    every = jnp.ones((batch, length), bool)
    valid = every if valid is None else valid
    reset = ~every if reset is None else reset

    def token(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        *operands, valid_B, reset_B = inputs
        fresh = jnp.where(reset_B[:, None, None, None], 0, state)
        q_t, k_t, v_t, log_decay_t, beta_t = (
            # Selected before use: a NaN in the padding reaches neither the sum nor its gradient.
            jnp.where(jnp.expand_dims(valid_B, range(1, x.ndim)), x.astype(dtype), 0)
            for x in operands
        )
        o_t, stepped = delta_step(q_t, k_t, v_t, log_decay_t, beta_t, fresh)
        return jnp.where(valid_B[:, None, None, None], stepped, state), o_t

    time_first = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, log_decay, beta, valid, reset))
    final_state, o_TBGV = jax.lax.scan(token, initial_state, time_first)
    return jnp.moveaxis(o_TBGV, 0, 1), final_state


def segment_masks(
    segment_ids: Int[Array, "B T"], id_before: Int[Array, " B"] | None = None
) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """(valid, reset): id 0 is padding; a valid token resets when its id is not the last valid one's.

    The first valid token of all never resets: the initial state belongs to its document.

    Args:
        segment_ids: the document of each token.
        id_before: the last valid id before these tokens, 0 where there is none; None: these are the first.
    """
    valid = segment_ids != 0
    # before[t] = the last id ≠ 0 among tokens 0 … t−1, else 0.
    latest = jax.lax.associative_scan(lambda a, b: jnp.where(b != 0, b, a), segment_ids, axis=1)
    before = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)))
    if id_before is not None:
        before = jnp.where(before != 0, before, id_before[:, None])
    return valid, valid & (before != 0) & (before != segment_ids)
