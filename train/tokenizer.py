"""Tokenizers: UTF-8 bytes, or a byte-level BPE trained on the train documents and cached.

Both put one token of their own, `bos_id`, before every document, so that its first real token is predicted
from something. It is the last id and no text encodes to it: it alone marks where documents begin in a
packed stream.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from train.data_cache import content_key, write_atomically

# All 256 bytes, the document token, and one merge: less than one merge is the tokenizer "bytes".
MIN_BPE_VOCAB_SIZE = 258

# Documents handed to the tokenizer at once: enough to occupy its threads, few enough to bound its memory,
# since it holds some hundred bytes for each token until a chunk is done.
_ENCODE_CHUNK = 256


class ByteTokenizer:
    """Ids 0 … 255 are the bytes of UTF-8; 256 begins a document.

    `fingerprint` is equal for two tokenizers, of this class or another, only if they encode everything alike.
    """

    vocab_size = 257
    bos_id = 256
    fingerprint = "bytes"

    def encode(self, documents: Iterable[bytes]) -> Iterator[np.ndarray]:
        """The ids of each UTF-8 document, a 1-d uint8 array each, without the document token."""
        for document in documents:
            yield np.frombuffer(document, np.uint8)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; document tokens give nothing, broken UTF-8 the replacement character."""
        ids = np.asarray(ids)
        return ids[ids != self.bos_id].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class BPETokenizer:
    """A byte-level BPE with GPT-2's word pattern, from the JSON that `tokenizers` writes; see `train_bpe`."""

    def __init__(self, serialized: str):
        self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        self.bos_id = self._tokenizer.get_vocab_size()
        self.vocab_size = self.bos_id + 1
        self.fingerprint = hashlib.sha256(serialized.encode()).hexdigest()

    def encode(self, documents: Iterable[bytes]) -> Iterator[np.ndarray]:
        """The ids of each UTF-8 document, a 1-d uint32 array each, without the document token."""
        documents = list(documents)
        for start in range(0, len(documents), _ENCODE_CHUNK):
            texts = [document.decode("utf-8") for document in documents[start : start + _ENCODE_CHUNK]]
            for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                yield np.asarray(encoding.ids, np.uint32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; document tokens give nothing, broken UTF-8 the replacement character."""
        ids = np.asarray(ids)
        return self._tokenizer.decode(ids[ids != self.bos_id].tolist())


Tokenizer = ByteTokenizer | BPETokenizer


def train_bpe(documents: Sequence[bytes], vocab_size: int) -> str:
    """Trains a byte-level BPE of exactly `vocab_size` ids (the document token included); returns its JSON.

    Raises:
      ValueError: `vocab_size` is below `MIN_BPE_VOCAB_SIZE`, or more than pairs seen twice can fill.
    """
    if vocab_size < MIN_BPE_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be at least {MIN_BPE_VOCAB_SIZE} for tokenizer bpe; got {vocab_size}."
        )
    bpe = tokenizers.Tokenizer(models.BPE())
    # The library's stubs declare these two without a setter.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        # A pair seen once teaches nothing but its own document.
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((document.decode("utf-8") for document in documents), trainer)
    largest = bpe.get_vocab_size() + 1
    if largest < vocab_size:
        raise ValueError(
            f"vocab_size must be at most {largest} for this corpus, which is too small for more BPE merges; "
            f"got {vocab_size}. Use {largest} or less, or a larger corpus."
        )
    return bpe.to_str()


def load_or_train_bpe(
    documents: Callable[[], Sequence[bytes]], documents_key: str, vocab_size: int, folder: pathlib.Path
) -> BPETokenizer:
    """The BPE of these documents from the cache `folder`, or trained now and put there.

    `documents` is called only when there is no sound cache entry; `documents_key` identifies what it
    returns. The library's version is part of the cache key, since another one may train otherwise.
    """
    key = content_key("bpe", tokenizers.__version__, documents_key, vocab_size)
    path = folder / f"bpe-{key}.json"
    serialized = _read_cached(path, key)
    if serialized is None:
        serialized = train_bpe(documents(), vocab_size)
        entry = {
            "key": key,
            "sha256": hashlib.sha256(serialized.encode()).hexdigest(),
            "tokenizer": serialized,
        }
        write_atomically(path, lambda file: file.write(json.dumps(entry).encode()))
    return BPETokenizer(serialized)


def _read_cached(path: pathlib.Path, key: str) -> str | None:
    """The serialized tokenizer, or None where the entry is missing, damaged or of another key."""
    try:
        entry = json.loads(path.read_bytes())
        serialized = entry["tokenizer"]
        sound = entry["key"] == key and entry["sha256"] == hashlib.sha256(serialized.encode()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return serialized if sound else None
