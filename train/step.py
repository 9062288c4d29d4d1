"""One training step as a pure function, and the program of a width: init, step, evaluate, jitted.

Whatever a sweep varies at a fixed shape (learning rate, seed, decay, preset) is an argument of the
step, so one compiled program serves all points of a width. Points may be packed along a leading
axis; each then has its own parameters and all see the same batch.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from gdn_jax import GDNLanguageModel, mup, param_specs
from gdn_jax.config import GDNConfig
from train import mesh as meshes
from train.config import OptimizerOptions
from train.data import Batch


class HParams(NamedTuple):
    """What may differ between the points of a pack; every leaf a float32 scalar.

    Attributes:
        learning_rate: peak, at the base width.
        weight_decay: lambda, at the base width.
        rules: the parametrization's table for this width.
    """

    learning_rate: Any
    weight_decay: Any
    rules: mup.Rules


class TrainState(NamedTuple):
    """Everything that a step changes.

    Attributes:
        params: trained parameters, nested dict, float32.
        constants: the model's untrained variables.
        opt_state: of the optax chain.
        step: int32, updates made, those included that the host chose to leave out.
        diverged_at: int32, the step (0-based) whose loss or gradient was not finite; -1: none. While it is set,
            every update is withheld, so that the host finds the state as that step found it.
    """

    params: Any
    constants: Any
    opt_state: Any
    step: jax.Array
    diverged_at: jax.Array


class Metrics(NamedTuple):
    """Of one step: scalars, float32; ``diverged_at`` as in the state after it."""

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    diverged_at: jax.Array


def schedule(step: jax.Array, steps: int, options: OptimizerOptions) -> jax.Array:
    """Learning rate / peak at ``step`` (0-based): linear warm-up, then a cosine down to the final fraction."""
    warmup = max(1, round(options.warmup_fraction * steps))
    done = jnp.asarray(step, jnp.float32)
    rising = (done + 1) / warmup
    progress = jnp.clip((done - warmup) / max(1, steps - 1 - warmup), 0.0, 1.0)
    falling = options.final_fraction + (1 - options.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return jnp.where(done < warmup, rising, falling)


def token_loss(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy in nats over ``mask``, and the number of tokens; float32 both.

    Args:
        logits: ``[B, T, vocab]`` float32.
        targets: ``[B, T]`` int32.
        mask: ``[B, T]``, 1 where the target counts.
    """
    # The target's logit by comparison, not by index: each device then looks through its own part of the vocabulary.
    is_target = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
    mask = mask.astype(jnp.float32)
    return jnp.sum(losses * mask), jnp.sum(mask)


@dataclasses.dataclass(frozen=True)
class Program:
    """Init, step and evaluation of one width, and what they close over.

    Attributes:
        config: of the model.
        specs: tree of ``ParamSpec`` with the structure of ``TrainState.params``.
        options: of the optimizer.
        steps: length of the schedule.
        accumulate: parts of a batch that are differentiated one after the other, for one update.
    """

    config: GDNConfig
    options: OptimizerOptions
    steps: int
    accumulate: int = 1

    @functools.cached_property
    def _abstract(self) -> tuple[Any, Any]:
        model = nnx.eval_shape(lambda: GDNLanguageModel(self.config, rngs=jax.random.key(0)))
        return nnx.graphdef(model), param_specs(model)

    @property
    def specs(self) -> Any:
        """Tree of ``ParamSpec`` with the structure of the parameters."""
        return self._abstract[1]

    def hparams(
        self, learning_rate: float, preset: str, weight_decay: float | None = None, **factors: float
    ) -> HParams:
        """The traced arguments of one point, as float32 numpy scalars; factors as of `mup.adjusted`."""
        rules = mup.resolve_rules(
            self.specs,
            preset=preset,
            optimizer=self.options.name,
            sizes=self.config.axis_sizes,
            base_sizes=self.config.base_axis_sizes,
        )
        rules = mup.adjusted(rules, self.specs, **factors)
        decay = self.options.weight_decay if weight_decay is None else weight_decay
        return jax.tree.map(np.float32, HParams(learning_rate, decay, rules))

    def optimizer(self, learning_rate: Any, peak: Any, hparams: HParams) -> optax.GradientTransformation:
        """The chain for one step, every number traced."""
        options = self.options
        common = {
            "weight_decay": hparams.weight_decay,
            "decay_mode": options.decay_mode,
            "clip_norm": options.clip_norm or None,
            "peak_learning_rate": peak,
        }
        if options.name != "sgd":
            with_adam = mup.adamw if options.name == "adamw" else mup.muon
            return with_adam(
                learning_rate,
                self.specs,
                hparams.rules,
                b1=options.beta1,
                b2=options.beta2,
                eps=options.epsilon,
                **common,
            )
        return mup.sgd(learning_rate, self.specs, hparams.rules, momentum=options.momentum, **common)

    def init(self, seed: jax.Array, hparams: HParams) -> TrainState:
        """A fresh state from an int32 seed."""
        model = GDNLanguageModel(self.config, rngs=jax.random.key(seed), rules=hparams.rules)
        _, params, constants = nnx.split(model, nnx.Param, ...)
        params = nnx.to_pure_dict(params)
        opt_state = self.optimizer(hparams.learning_rate, hparams.learning_rate, hparams).init(params)
        return TrainState(params, nnx.to_pure_dict(constants), opt_state, jnp.int32(0), jnp.int32(-1))

    def state_sharding(self, mesh: Mesh) -> Any:
        """Where each array of a state lies: a ``TrainState`` of ``NamedSharding``."""
        hparams = self.hparams(1.0, self.config.preset)
        state = jax.eval_shape(self.init, np.int32(0), hparams)
        return meshes.state_sharding(mesh, self.specs, state)

    def model(self, params: Any, constants: Any) -> GDNLanguageModel:
        """The model of these values."""
        return nnx.merge(self._abstract[0], nnx.State(params), nnx.State(constants))

    def loss_sum(self, params: Any, constants: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Summed cross-entropy of a batch in nats, and its number of tokens."""
        tokens, targets, segment_ids, mask = map(jnp.asarray, batch)
        return token_loss(self.model(params, constants)(tokens, segment_ids), targets, mask)

    def step(self, state: TrainState, batch: Batch, hparams: HParams) -> tuple[TrainState, Metrics]:
        """One update; none where loss or gradient is not finite, or ever was (`TrainState.diverged_at`)."""
        loss, grads = self._loss_and_gradient(state, batch)
        grad_norm = optax.tree.norm(grads)
        rate = hparams.learning_rate * schedule(state.step, self.steps, self.options)
        optimizer = self.optimizer(rate, hparams.learning_rate, hparams)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        first_bad = jnp.where(finite, jnp.int32(-1), state.step)
        diverged_at = jnp.where(state.diverged_at >= 0, state.diverged_at, first_bad)
        updated = TrainState(params, state.constants, opt_state, state.step + 1, diverged_at)
        withheld = state._replace(diverged_at=diverged_at)
        new_state = jax.tree.map(functools.partial(jnp.where, diverged_at < 0), updated, withheld)
        return new_state, Metrics(loss, grad_norm, rate, diverged_at)

    def _loss_and_gradient(self, state: TrainState, batch: Batch) -> tuple[jax.Array, Any]:
        """Mean loss of a batch in nats a token, and its gradient with respect to the parameters."""
        if self.accumulate == 1:

            def mean_loss(params: Any) -> jax.Array:
                total, count = self.loss_sum(params, state.constants, batch)
                return total / jnp.maximum(count, 1.0)

            return jax.value_and_grad(mean_loss)(state.params)

        def part(x: Any) -> jax.Array:
            # Part i holds rows i, i + n, ...: of each device's rows as many as of any other's.
            x = jnp.asarray(x)
            return x.reshape(-1, self.accumulate, *x.shape[1:]).swapaxes(0, 1)

        def add(sums: Any, rows: Batch) -> tuple[Any, None]:
            summed = jax.value_and_grad(self.loss_sum, has_aux=True)
            (total, count), grads = summed(state.params, state.constants, rows)
            return jax.tree.map(jnp.add, sums, (total, count, grads)), None

        nothing = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params))
        (total, count, grads), _ = jax.lax.scan(add, nothing, jax.tree.map(part, batch))
        count = jnp.maximum(count, 1.0)
        return total / count, jax.tree.map(lambda gradient: gradient / count, grads)

    def evaluate(self, state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Summed loss and token count of one batch."""
        return self.loss_sum(state.params, state.constants, batch)


def quick_options(platform: str) -> dict[str, Any]:
    """Compiler options for programs that run too briefly to be worth autotuning; none but on a `gpu`.

    A sweep's runs are short: autotuning takes longer than it saves them (28.9 ms a step in place of 30.8 at width 256
    on an H100), and takes the GPU from the width that runs meanwhile; without it Triton's products are 7 times slower.
    """
    return {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False} if platform == "gpu" else {}


class Compiled(NamedTuple):
    """Jitted functions of a program; ``step`` donates the state it is given.

    With ``packed`` every state, seed and hparam has a leading axis of points; batches have not.
    """

    # Jitted (`lower` is there), or compiled ahead of time.
    init: Any
    step: Any
    evaluate: Any
    packed: bool
    mesh: Mesh


def compile_program(program: Program, mesh: Mesh, *, packed: bool) -> Compiled:
    """Jits a program over a mesh.

    Args:
        program: of one width.
        mesh: from ``train.mesh``; a packed program shards its points over ``sweep``. Where parameters, state and
            batches of a point lie is the mesh's affair.
        packed: whether a leading axis of points is there.
    """
    init, step, evaluate = program.init, program.step, program.evaluate
    points = meshes.points_sharding(mesh) if packed else meshes.replicated(mesh)
    batch = meshes.batch_sharding(mesh)
    state = points
    if mesh.size > mesh.shape[meshes.SWEEP]:
        state = program.state_sharding(mesh)
        if packed:
            state = meshes.of_points(state)
    if packed:
        init, step, evaluate = meshes.over_points(mesh, init, step, evaluate)
    else:
        init = meshes.in_context(mesh, init)
        step, evaluate = meshes.in_context(mesh, step), meshes.in_context(mesh, evaluate)
    quick = quick_options(mesh.devices.flat[0].platform) if packed else {}
    return Compiled(
        # Runs once a point: half of LLVM's work on it would take longer than the run saves (10 s against 2).
        jax.jit(
            init,
            in_shardings=(points, points),
            # Parts from the first byte: nothing is ever whole on one device.
            out_shardings=state,
            compiler_options={"xla_backend_optimization_level": 1} | quick,
        ),
        jax.jit(
            step,
            in_shardings=(state, batch, points),
            out_shardings=(state, points),
            donate_argnums=0,
            compiler_options=quick,
        ),
        jax.jit(evaluate, in_shardings=(state, batch), out_shardings=points, compiler_options=quick),
        packed,
        mesh,
    )


def ahead_of_time(
    compiled: Compiled, seeds: Any, hparams: HParams, batch: Batch, *, init: bool = True
) -> Compiled:
    """The same functions, compiled now for arguments of these shapes; calling them compiles nothing.

    Without ``init`` that one is left as it is, for a state that is restored.
    """
    state = jax.eval_shape(compiled.init, seeds, hparams)
    return compiled._replace(
        init=compiled.init.lower(seeds, hparams).compile() if init else compiled.init,
        step=compiled.step.lower(state, batch, hparams).compile(),
        evaluate=compiled.evaluate.lower(state, batch).compile(),
    )
