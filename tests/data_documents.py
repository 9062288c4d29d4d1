"""Documents and a corpus that the data tests share."""

import json
import pathlib

import numpy as np

from train.data import DataConfig


def make_documents(count: int, seed: int = 0) -> list[bytes]:
    """Documents of 1 to about 400 bytes, all different, of repeated words, some not ASCII."""
    rng = np.random.default_rng(seed)
    words = ["the", "delta", "rule", "über", "naïve", "gate", "日本", "of", "memory", "\n"]
    documents = [" ".join(rng.choice(words, rng.integers(1, 80))) + f" {i}" for i in range(count)]
    return [b"x", *(document.encode() for document in documents[1:])]


def write_jsonl(path: pathlib.Path, documents: list[bytes]) -> str:
    path.write_text("".join(json.dumps({"text": document.decode()}) + "\n" for document in documents))
    return str(path)


def jsonl_config(tmp_path: pathlib.Path) -> DataConfig:
    """A config over 120 documents, cached in the folder."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", make_documents(120))
    return DataConfig(corpus=corpus, sequence_length=64, batch_size=7, cache_dir=str(tmp_path / "cache"))
