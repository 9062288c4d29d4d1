"""Files of the data cache: named by what they hold, replaced as a whole, checked when read."""

import contextlib
import hashlib
import os
import pathlib
import uuid
from collections.abc import Callable
from typing import IO, Any


def default_cache_folder() -> pathlib.Path:
    """`$XDG_CACHE_HOME/gdn`, or `~/.cache/gdn` where that is not set (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification: relative paths are invalid and to be ignored.
    root = pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache"
    return root / "gdn"


def content_key(*parts: str | int | float) -> str:
    """SHA-256 (hex) over the parts; different lists of parts give different keys."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def file_sha256(path: pathlib.Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: pathlib.Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a cache file so that readers and other writers see the old file or the whole new one.

    Raises:
      ValueError: the folder cannot be made or written to (no permission, no space).
    """
    # Not `tempfile`: its files are readable by their owner only, and a cache may be shared by a group.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(
            f"cache_dir must be a folder that can be written; {str(path.parent)!r} cannot: "
            f"{error.strerror or error}. Name another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
