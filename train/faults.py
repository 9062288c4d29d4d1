"""What goes wrong outside the program, said in one line."""

import contextlib
import errno
import os
import pathlib
import traceback
from collections.abc import Callable, Iterator


class RunFailedError(Exception):
    """A run ended early for a reason that the user can remove; the message is one clear line."""


_FULL = (errno.ENOSPC, errno.EDQUOT)
# What TensorStore says; it has no errno of its own.
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "RESOURCE_EXHAUSTED: Error writing")


def is_disk_full(error: BaseException | None) -> bool:
    """Whether ``error`` or what caused it is a disk without space."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """Of what an error says, 200 letters at most; its class where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an array did not fit, on a device or on the host."""
    # What XLA says has no class of its own, and one of several codes.
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def in_a_line(error: BaseException) -> str | None:
    """What a user is told of an error of the machine or of a file; None of one that may be a fault of ours."""
    if is_out_of_memory(error):
        return (
            f"out of memory ({first_line(error)}); use a smaller width or batch, or in training "
            "--accumulate or --model.remat, in a sweep fewer --points-per-device. What was saved is kept."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; put it right, or choose another folder. What was saved is kept."
    frames = traceback.extract_tb(error.__traceback__)
    # jax's, which says of a build without that platform no more than that an assertion failed.
    if "Unable to initialize backend" in str(error) or (
        isinstance(error, AssertionError) and frames and "xla_bridge" in frames[-1].filename
    ):
        platforms = os.environ.get("JAX_PLATFORMS")
        return (
            f"jax finds no device (JAX_PLATFORMS is {platforms!r}; {first_line(error)}); install the jax that has it, "
            "as in pip install -e '.[train,gpu]', or unset JAX_PLATFORMS."
        )
    return None


@contextlib.contextmanager
def disk_full_said(folder: pathlib.Path, kept: Callable[[], str]) -> Iterator[None]:
    """Turns a full disk in here into a `RunFailedError`.

    Args:
        folder: where there is no space.
        kept: what is safe all the same, a clause.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise RunFailedError(
            f"no space left in {folder}; {kept()}. Free some space, and the same command goes on from there."
        ) from error
