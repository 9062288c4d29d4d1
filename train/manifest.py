"""SHA-256 manifests: which files a checkpoint has, and what is in them.

Every process hashes files of its own and writes one part, ``manifest.<process>``: on its first line the SHA-256 of
what follows, then JSON with the number of processes, and size and SHA-256 of each file. A folder is sound when all
parts are there, each is as its first line says, and together they name just the files that there are, as they are.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

_PART = re.compile(r"manifest\.\d+")
# What Orbax lets each process write lies in a folder of that name.
_OF_PROCESS = re.compile(r"ocdbt\.process_(\d+)")
# Hashing runs at about 1.5 GB/s a core, as fast as a good disk: more threads would only take cores from training.
_THREADS = 8
# A process that hashes terabytes takes minutes; one that died never comes.
_WAIT_S = 3600.0


def write_part(folder: pathlib.Path, process: int, processes: int) -> None:
    """Hashes the files that belong to ``process`` and writes its part.

    Args:
        folder: whose files are all written.
        process: index of this one; files that nobody in particular wrote are the first's.
        processes: how many there are.
    """
    own = [name for name in _files(folder) if _owner(name) % processes == process]
    content = {"processes": processes, "files": dict(zip(own, _hash_all(folder, own), strict=True))}
    body = json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"
    temporary = folder / f"manifest.{process}.partial"
    with temporary.open("wb") as file:
        file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / f"manifest.{process}")


def await_parts(folder: pathlib.Path, processes: int) -> None:
    """Waits until every process has written its part; TimeoutError when one does not."""
    deadline = time.monotonic() + _WAIT_S
    while missing := [p for p in range(processes) if not (folder / f"manifest.{p}").exists()]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder}: processes {missing} wrote no manifest within {_WAIT_S:.0f} s.")
        time.sleep(0.05)


def problem(
    folder: pathlib.Path, share: Callable[[list[str]], Iterable[str]] = lambda names: names
) -> str | None:
    """What is wrong with ``folder``, in a few words; ``None``: it is sound.

    Args:
        folder: of a checkpoint.
        share: the files, of all those named, whose content to hash here; the others are looked up only.
    """
    expected: dict[str, Any] = {}
    counts = set()
    parts = 0
    try:
        for path in folder.iterdir():
            if not _PART.fullmatch(path.name):
                continue
            parts += 1
            digest, _, body = path.read_bytes().partition(b"\n")
            if hashlib.sha256(body).hexdigest().encode() != digest:
                return f"{path.name} is damaged"
            content = json.loads(body)
            counts.add(content["processes"])
            expected |= content["files"]
        if not parts:
            return "it has no manifest"
        if counts != {parts}:
            return f"it has {parts} parts of a manifest of {'/'.join(map(str, sorted(counts)))}"
        found = _files(folder)
        for name in sorted(expected.keys() ^ set(found)):
            return f"{name} is missing" if name in expected else f"{name} is not of it"
        names = list(share(found))
        for name, (size, digest) in zip(names, _hash_all(folder, names), strict=True):
            if [size, digest] != expected[name]:
                return f"{name} is damaged ({size} bytes of {expected[name][0]})"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it cannot be read ({error})"
    return None


def _files(folder: pathlib.Path) -> list[str]:
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if not _PART.fullmatch(name.removesuffix(".partial")))


def _owner(name: str) -> int:
    match = _OF_PROCESS.search(name)
    return int(match[1]) if match else 0


def _hash_all(folder: pathlib.Path, names: list[str]) -> list[list[Any]]:
    with concurrent.futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda name: _hash(folder / name), names))


def _hash(path: pathlib.Path) -> list[Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), digest]
