"""Parquet, ArrayRecord and Hugging Face datasets give the documents of the same JSONL, and say what is wrong."""

import importlib.util
import json
import sys
import types

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from train import corpus as corpora
from train.data import DataConfig, prepare, train_batch

TEXTS = [f"document {i}: " + "word " * (5 + i) for i in range(40)]
DOCUMENTS = [text.encode() for text in TEXTS]


def read(path):
    corpus = corpora.find_corpus(str(path))
    return corpora.read_documents(corpus, corpora.corpus_digest(corpus))


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:4")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def test_array_record_trains_like_jsonl(tmp_path):
    records = write_array_record(tmp_path / "a.array_record", DOCUMENTS)
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert read(records) == read(lines) == DOCUMENTS
    batches = []
    for path in (records, lines):
        config = DataConfig(
            corpus=str(path), cache_dir=str(tmp_path / "cache"), sequence_length=16, batch_size=4
        )
        batches.append(train_batch(prepare(config), config, 3))
    assert (batches[0].tokens == batches[1].tokens).all()


def test_a_folder_of_record_files_is_one_corpus_in_order(tmp_path):
    write_array_record(tmp_path / "2.array_record", DOCUMENTS[20:])
    write_array_record(tmp_path / "1.array_record", DOCUMENTS[:20])
    assert read(tmp_path) == DOCUMENTS


def test_wrong_array_records(tmp_path):
    (tmp_path / "no.array_record").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(ValueError, match=r"no.array_record' cannot be read as ArrayRecord"):
        read(tmp_path / "no.array_record")
    binary = write_array_record(tmp_path / "binary.array_record", [b"fine", b"\xff\xfe"])
    with pytest.raises(ValueError, match="record 1 must be UTF-8 text"):
        read(binary)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="of the extra `data`")
def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))}), path, row_group_size=7)
    assert read(path) == DOCUMENTS
    parquet.write_table(pyarrow.table({"body": TEXTS}), path)
    with pytest.raises(ValueError, match='must have a column "text"; it has body'):
        read(path)
    parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    with pytest.raises(ValueError, match='each "text" must be a string; got 1'):
        read(path)
    path.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read(path)


@pytest.mark.parametrize("name", ["pyarrow", "datasets"])
def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch, name):
    # None: an import of it fails, installed or not.
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=rf"needs the package {name}, .*gdn-jax\[data\]"):
        read(path if name == "pyarrow" else "hf:some/dataset")


def test_hugging_face(monkeypatch):
    """Its interface alone: a hub is not for tests."""
    asked = []

    class Table(list):
        column_names = ("text", "url")

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "missing":
            raise FileNotFoundError("no such dataset")
        return Table({"text": text, "url": ""} for text in TEXTS)

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read("hf:some/text,config@validation") == DOCUMENTS
    assert set(asked) == {("some/text", "config", "validation")}
    with pytest.raises(ValueError, match="corpus 'hf:missing' cannot be loaded: no such dataset"):
        read("hf:missing")
