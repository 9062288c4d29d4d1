"""Data: every wrong value and every wrong corpus gives one clear line."""

import dataclasses
import pathlib

import pytest
from data_documents import jsonl_config

from train.data import DataConfig, prepare, train_batch, train_loader, validation_batches
from train.tokenizer import train_bpe


@pytest.fixture
def config(tmp_path) -> DataConfig:
    return jsonl_config(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sequence_length", 0, "sequence_length must be at least 2; got 0."),
        ("sequence_length", 1, "sequence_length must be at least 2; got 1."),
        ("batch_size", -4, "batch_size must be at least 1; got -4."),
        ("validation_batches", 0, "validation_batches must be at least 1; got 0."),
        ("validation_fraction", 0.0, "validation_fraction must be between 0 and 1, both excluded; got 0.0."),
        ("validation_fraction", 1.0, "validation_fraction must be between 0 and 1, both excluded; got 1.0."),
        ("validation_fraction", float("nan"), "between 0 and 1, both excluded; got nan."),
        ("seed", -1, "seed must be at least 0; got -1."),
        ("vocab_size", -1, "vocab_size must be at least 1; got -1."),
    ],
)
def test_values_out_of_their_domain_are_refused_on_construction(field, value, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")) as caught:
        DataConfig(**{field: value})
    assert "\n" not in str(caught.value)


def test_a_bpe_needs_room_for_bytes_and_its_document_token():
    with pytest.raises(ValueError, match="vocab_size must be at least 258; got 257"):
        DataConfig(tokenizer="bpe", vocab_size=257)
    with pytest.raises(ValueError, match="vocab_size must be at least 258 for tokenizer bpe; got 3"):
        train_bpe([b"a"], 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "got '.*missing.txt', which does not exist. Check the path"),
        ("", None, "got '', which does not exist"),
        ("x" * 5000, None, "cannot be looked up"),
        ("empty.txt", b"", "is empty: its 1 file.* no text"),
        ("blank.txt", b" \n\n\t", "is empty"),
        ("empty.jsonl", b"\n", "is empty"),
        ("blank.jsonl", b'{"text": ""}\n{"text": " "}\n', "is empty"),
        ("nul.bin", b"abc\0def", r"nul.bin' must be text; it is binary \(a NUL byte at offset 3\)"),
        ("latin1.txt", "größe".encode("latin1"), "must be UTF-8 text; byte 0xf6 at offset 2 is not"),
        ("one.txt", b"One paragraph only.", "at least 2 different documents.* Put blank lines"),
        ("cut.jsonl", b'{"text": "a"}\n\n{"text": "b', "cut.jsonl' line 3 must be a JSON object.*parsed"),
        ("deep.jsonl", b"[" * 10**6, "line 1 must be a JSON object.*parsed"),
        ("list.jsonl", b'["text"]', 'line 1 must be a JSON object whose "text" is a string'),
        ("field.jsonl", b'{"text": "a"}\n{"txt": "b"}', 'line 2 must be .* whose "text" is a string'),
        ("number.jsonl", b'{"text": 3}', "line 1 must be"),
        ("bytes.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "line 2 must be a JSON object in UTF-8"),
        ("half.jsonl", b'{"text": "\\ud800"}', "line 1: .*surrogate"),
        ("nul.jsonl", b'{"text": "\\u0000"}', "line 1: .*NUL"),
        ("same.jsonl", b'{"text": "a"}\n{"text": "a"}', "at least 2 different documents"),
        ("small.jsonl", b'{"text": "a"}\n{"text": "b"}', "too small: its train documents have 2 .* = 65"),
    ],
)  # fmt: skip
def test_a_wrong_corpus_gives_one_clear_line(config, tmp_path, name, content, message):
    path = tmp_path / name if name else ""
    if content is not None:
        pathlib.Path(path).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(dataclasses.replace(config, corpus=str(path)))
    assert "\n" not in str(caught.value)


def test_a_corpus_too_small_for_one_validation_row_is_refused(config):
    with pytest.raises(
        ValueError, match=r"its validation documents have \d+ tokens, and one row takes .* = 5001"
    ):
        prepare(dataclasses.replace(config, sequence_length=5000))


def test_a_folder_without_texts_is_refused(config, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "table.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"holds no \*.txt or \*.md files"):
        prepare(dataclasses.replace(config, corpus=str(folder)))
    (folder / "only.txt").write_text("One.")
    with pytest.raises(ValueError, match="Add files, or name the one file itself"):
        prepare(dataclasses.replace(config, corpus=str(folder)))


def test_a_folder_of_two_kinds_is_refused(config, tmp_path):
    """A data set's card would be read in its place."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("A card.")
    (folder / "data.jsonl").write_text('{"text": "One."}\n')
    with pytest.raises(ValueError, match=r"2 kinds \(such as README.md, data.jsonl\)"):
        prepare(dataclasses.replace(config, corpus=str(folder)))


def test_a_vocabulary_that_the_corpus_cannot_fill_is_refused_with_the_largest_that_it_can(config):
    config = dataclasses.replace(config, tokenizer="bpe", vocab_size=10**6)
    with pytest.raises(ValueError, match="too small for more BPE merges; got 1000000") as caught:
        prepare(config)
    largest = int(str(caught.value).split("must be at most ")[1].split()[0])
    assert prepare(dataclasses.replace(config, vocab_size=largest)).vocab_size == largest


def test_a_cache_folder_that_is_a_file_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache_dir must be a folder that can be written; '.*file' cannot"):
        prepare(dataclasses.replace(config, cache_dir=str(tmp_path / "file")))


def test_data_of_another_row_length_are_refused(config):
    data, other = prepare(config), dataclasses.replace(config, sequence_length=32)
    for call in (train_loader, validation_batches, lambda data, config: train_batch(data, config, 0)):
        with pytest.raises(ValueError, match="sequence_length was 64; got 32"):
            call(data, other)
