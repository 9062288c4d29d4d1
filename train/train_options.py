"""What one training run may be told."""

import dataclasses
import pathlib

from train.config import PresetName, check_learning_rate, check_preset_name
from train.profiling import parse_steps
from train.rates import Rate
from train.trackers import TrackerName, check_installed
from train.tuned import ChangeName

DEFAULT_LEARNING_RATE = 2.0**-7


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """One training run, and where its log and checkpoints go."""

    out: pathlib.Path
    """Folder of checkpoints and log; a run that was stopped goes on from it."""
    width: int = 64
    """Model width."""
    learning_rate: Rate = None
    """Peak learning rate at the base width, as 0.01 or 2^-7; by default 2^-7, or what --tuned-by found."""
    preset: PresetName | None = None
    """Parametrization; by default mup, or the one that --tuned-by found to transfer."""
    tuned_by: pathlib.Path | None = None
    """Folder of a sweep: its optimum, preset, optimizer, base sizes, data settings and steps are the defaults here."""
    accept_change: tuple[ChangeName, ...] = ()
    """With --tuned-by: in what this run may differ from the sweep, although that may move the optimum."""
    seed: int = 0
    """Seed of the initialisation; the data have their own."""
    steps: int = 200
    """Training steps; the schedule's length."""
    stop_at: int | None = None
    """Save and stop after this step of the schedule; run again without it to go on."""
    checkpoint_every: int = 100
    """Steps that a kill may cost: a save begins after half as many, and is on disk before the next begins.
    The last step is always saved."""
    validate_every: int = 100
    """Steps between validations; the last step is always validated."""
    coordinates_every: int = 0
    """Steps between rows of coordinates.jsonl, per layer: sizes of activations and of what updates do, saturation of
    the gates, coherence of their gradients. 0: none."""
    accumulate: int = 1
    """Parts of a batch that are computed one after the other for one update: less memory, the same training."""
    log_to: tuple[TrackerName, ...] = ()
    """Write the log there as well: tensorboard (OUT/tensorboard), wandb; pip install -e '.[log]' brings both."""
    profile_steps: str | None = None
    """FIRST..LAST: trace these steps for TensorBoard's profiler or Perfetto, into OUT/profile."""

    def __post_init__(self) -> None:
        for name in ("width", "steps", "checkpoint_every", "validate_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be positive; got {getattr(self, name)}.")
        if self.stop_at is not None and not 1 <= self.stop_at <= self.steps:
            raise ValueError(f"--stop-at must be from 1 to --steps ({self.steps}); got {self.stop_at}.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"--seed must be in [0, 2^31); got {self.seed}.")
        if self.coordinates_every < 0:
            raise ValueError(f"--coordinates-every must be 0 or more; got {self.coordinates_every}.")
        if self.steps >= 2**31:
            raise ValueError(f"--steps must be below 2^31; got {self.steps}.")
        traced = parse_steps(self.profile_steps)
        if traced is not None and traced[1] > (self.stop_at or self.steps):
            raise ValueError(
                f"--profile-steps must end by the last step ({self.stop_at or self.steps}); got {self.profile_steps}."
            )
        if len(set(self.log_to)) < len(self.log_to):
            raise ValueError(f"--log-to must name each once; got {' '.join(self.log_to)}.")
        check_installed(self.log_to)
        if self.learning_rate is not None:
            check_learning_rate(self.learning_rate)
        if self.preset is not None:
            check_preset_name(self.preset, "--preset")
        if self.tuned_by is not None and self.learning_rate is not None:
            raise ValueError("--learning-rate is what --tuned-by gives; use one of the two.")
        if self.accept_change and self.tuned_by is None:
            raise ValueError(
                "--accept-change says in what a run may differ from --tuned-by; name that sweep."
            )
