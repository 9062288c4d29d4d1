"""Documents out of Parquet, ArrayRecord and Hugging Face `datasets`: formats that need a package to be read.

Parquet needs pyarrow and Hugging Face needs datasets, both of `pip install 'gdn-jax[data]'`; array_record comes
with Grain. In tables the column "text" is read; a record of an ArrayRecord is a document in UTF-8.
"""

import importlib
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

HUGGING_FACE = "hf:"
TEXT_COLUMN = "text"


def read_parquet(path: pathlib.Path) -> Iterator[bytes]:
    """The documents of a Parquet file, one row group in memory at a time.

    Raises:
      ValueError: pyarrow is not installed, or the file is no Parquet file with a column "text" of strings.
    """
    parquet, arrow = _package("pyarrow.parquet", "Parquet"), _package("pyarrow", "Parquet")
    try:
        file = parquet.ParquetFile(path)
        if TEXT_COLUMN not in file.schema_arrow.names:
            raise ValueError(
                f'corpus file {str(path)!r} must have a column "{TEXT_COLUMN}"; it has '
                f"{', '.join(file.schema_arrow.names)}."
            )
        for group in range(file.num_row_groups):
            column = file.read_row_group(group, columns=[TEXT_COLUMN])[TEXT_COLUMN]
            yield from _checked(path, column.to_pylist())
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"corpus file {str(path)!r} cannot be read as Parquet: {reason}.") from error


def read_array_record(path: pathlib.Path) -> Iterator[bytes]:
    """The documents of an ArrayRecord file.

    Raises:
      ValueError: it is none, or a record is not UTF-8 text.
    """
    module = _package("array_record.python.array_record_module", "ArrayRecord")
    try:
        reader = module.ArrayRecordReader(str(path))
        try:
            # In pieces: all records at once may not fit into memory beside what becomes of them.
            for start in range(0, reader.num_records(), _RECORDS_AT_ONCE):
                end = min(start + _RECORDS_AT_ONCE, reader.num_records())
                for number, record in enumerate(reader.read(start, end), start):
                    yield from _checked(path, [_decoded(path, number, record)])
        finally:
            reader.close()
    except (RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"corpus file {str(path)!r} cannot be read as ArrayRecord: {reason}.") from error


_RECORDS_AT_ONCE = 10_000


def read_hugging_face(name: str) -> Iterator[bytes]:
    """The documents of ``hf:NAME[,CONFIG][@SPLIT]``: of the hub, or a folder that ``save_to_disk`` wrote.

    Raises:
      ValueError: datasets is not installed, or there is no such dataset with a column "text" of strings.
    """
    datasets = _package("datasets", "Hugging Face datasets")
    wanted, _, split = name.removeprefix(HUGGING_FACE).partition("@")
    wanted, _, config = wanted.partition(",")
    try:
        if pathlib.Path(wanted).expanduser().is_dir():
            table = datasets.load_from_disk(str(pathlib.Path(wanted).expanduser()))
            if isinstance(table, dict):
                table = table[split or "train"]
        else:
            table = datasets.load_dataset(wanted, config or None, split=split or "train")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"corpus {name!r} cannot be loaded: {reason}.") from error
    if TEXT_COLUMN not in table.column_names:
        raise ValueError(
            f'corpus {name!r} must have a column "{TEXT_COLUMN}"; it has {", ".join(table.column_names)}.'
        )
    for row in table:
        yield from _checked(name, [row[TEXT_COLUMN]])


def _package(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"{what} needs the package {name.split('.')[0]}, which is not installed. "
            "Run `pip install 'gdn-jax[data]'`."
        ) from None


def _decoded(path: pathlib.Path, number: int, record: bytes) -> str:
    try:
        return record.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"corpus file {str(path)!r} record {number} must be UTF-8 text.") from None


def _checked(where: pathlib.Path | str, texts: Iterable[Any]) -> Iterator[bytes]:
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f'corpus {str(where)!r}: each "{TEXT_COLUMN}" must be a string; got {text!r}.')
        if "\0" in text:
            raise ValueError(
                f'corpus {str(where)!r}: a "{TEXT_COLUMN}" holds a NUL character; it must be text.'
            )
        try:
            yield text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(
                f'corpus {str(where)!r}: a "{TEXT_COLUMN}" holds half of a surrogate pair, which is no character.'
            ) from None
