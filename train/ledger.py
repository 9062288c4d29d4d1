"""The sweep's ledger: one JSON row per finished point, appended so that a kill can lose only the last line."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from train.vary import LEARNING_RATE, not_default, same

ROWS_FILE = "rows.jsonl"
CONFIG_FILE = "sweep.json"

# A point is one line of the ledger; these name it within a sweep.
POINT_KEYS = ("preset", "width", LEARNING_RATE, "seed")


def point_key(row: Mapping[str, Any], weight_decay: float | None = None) -> tuple[Any, ...]:
    """What names a point: `POINT_KEYS`, and what else was varied if it is not the default; the configured decay is."""
    names = (same(row[key]) if key == LEARNING_RATE else row[key] for key in POINT_KEYS)
    return (*names, not_default(row, weight_decay))


def fingerprint(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a JSON-able value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_version() -> str:
    """Identifies the code that runs: a hash over the sources of the three packages."""
    digest = hashlib.sha256()
    root = pathlib.Path(__file__).resolve().parents[1]
    for package in ("kernels_pallas", "gdn_jax", "train"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def make_writable(folder: pathlib.Path, what: str = "--out") -> None:
    """Makes ``folder``, which the user knows as ``what``; ValueError when nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{what} must be a folder that can be written; {folder}: {error.strerror}."
        ) from error


@contextlib.contextmanager
def only_process(folder: pathlib.Path) -> Iterator[None]:
    """Holds the folder's lock; ValueError when another process has it. The lock dies with its process."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"--out {folder} is in use by another gdn process; wait for it or choose another folder."
            ) from error
        yield


def check_identity(
    folder: pathlib.Path,
    name: str,
    config: Mapping[str, Any],
    *,
    changes: bool = False,
    option: str | None = None,
) -> str:
    """Writes ``config`` to a new folder, or compares it with what the folder was begun with.

    Args:
        folder: of a sweep or a run.
        name: of the file.
        config: JSON-able; all that must not change when a run goes on.
        changes: the folder goes on with ``config``, whatever it was begun with.
        option: of the command line, which says so.

    Returns:
        The fingerprint of ``config``.

    Raises:
        ValueError: the folder holds another configuration; the message names the differences.
    """
    path = folder / name
    if not path.exists():
        write_atomically(path, json.dumps(config, indent=1, sort_keys=True) + "\n")
        return fingerprint(config)
    before = read_config(path)
    if fingerprint(before) != fingerprint(config):
        if changes:
            write_atomically(path, json.dumps(config, indent=1, sort_keys=True) + "\n")
            return fingerprint(config)
        raise ValueError(
            f"{folder} was begun with another configuration ({differences(before, config)}); use those values, or "
            f"another --out{f', or {option} to go on with these' if option else ''}."
        )
    return fingerprint(config)


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """What a folder was begun with; ValueError where the file is damaged."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); choose another --out.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged (no configuration); choose another --out.")
    return config


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Up to four values that two configurations have different, each as ``name 1 -> 2``; "" where they are equal."""
    old, new = (_flatten(json.loads(json.dumps(config))) for config in (before, after))
    changed = [
        f"{key} {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]
    return "; ".join(changed[:4]) + ("; …" if len(changed) > 4 else "")


class Ledger:
    """Rows of a folder; refuses a folder that was begun with another configuration."""

    def __init__(self, folder: pathlib.Path, config: Mapping[str, Any]) -> None:
        self.path = folder / ROWS_FILE
        if self.path.exists() and not (folder / CONFIG_FILE).exists():
            raise ValueError(
                f"{folder} has {ROWS_FILE} but no {CONFIG_FILE}; choose an empty folder as --out."
            )
        begun = self.path.exists() and self.path.stat().st_size > 0
        if not begun and not any(folder.glob("stopped/*")):
            # Nothing was run: a first attempt that failed binds nobody.
            (folder / CONFIG_FILE).unlink(missing_ok=True)
        self.fingerprint = check_identity(folder, CONFIG_FILE, config)
        self._weight_decay = config.get("optimizer", {}).get("weight_decay")
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._load()

    def _load(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                self.rows[point_key(row, self._weight_decay)] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number} is no row of a sweep ({error}); remove it to run its point again."
                ) from error
        if len(whole) < len(content):
            # A kill came in the middle of a line: that point is run again.
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
                os.fsync(file.fileno())

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Adds rows, in one write; they are on disk when this returns. A point is not written twice."""
        new: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in rows:
            new.setdefault(point_key(row, self._weight_decay), row)
        new = {key: row for key, row in new.items() if key not in self.rows}
        lines = "".join(json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in new.values())
        with self.path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows |= new


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file that is either whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
