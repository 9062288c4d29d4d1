"""Documents packed once into one stream of tokens; rows of it are read at random.

The stream of a split is BOS d₁ BOS d₂ …, BOS being the tokenizer's document token. Row i of length T has
`tokens = stream[iT : iT+T]` and `targets = stream[iT+1 : iT+T+1]`, so over all rows every token of every
document is predicted exactly once (a document's first token from BOS). A long document goes on in the next
row, where the model's state starts anew; BOS is never a target, since it stands across a document's border.
Where documents begin is read off the BOS tokens, so one flat `.npy` file is all there is to store, and it
serves every T.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Integer

from train.data_cache import content_key, file_sha256, write_atomically
from train.tokenizer import Tokenizer

# Bump when the same tokens would be laid out otherwise: cached streams are then made anew.
PACKING_VERSION = 1


class Batch(NamedTuple):
    """Rows of packed documents, arrays of NumPy."""

    tokens: Int32[np.ndarray, "B T"]
    """Inputs; the document token where there is padding."""
    targets: Int32[np.ndarray, "B T"]
    """The token after each input; the document token where `loss_mask` is 0."""
    segment_ids: Int32[np.ndarray, "B T"]
    """1, 2, … per document within the row, 0 for padding."""
    loss_mask: Float32[np.ndarray, "B T"]
    """1 where the target is the next token of the same document, else 0. Never 0 in all of a batch."""


@dataclasses.dataclass(frozen=True, eq=False)
class PackedSplit:
    """One split (train or validation) as a stream of tokens, seen as rows of `sequence_length`."""

    stream: Integer[np.ndarray, " num_tokens"]
    """The tokens, memory-mapped; read-only."""
    bos_id: int
    num_documents: int
    sequence_length: int

    @property
    def num_tokens(self) -> int:
        """All tokens of the stream, one BOS per document included."""
        return len(self.stream)

    @property
    def num_predicted_tokens(self) -> int:
        """Tokens that an epoch predicts: all but the BOS. The sum of `loss_mask` over all rows."""
        return self.num_tokens - self.num_documents

    @property
    def num_sequences(self) -> int:
        """Rows, of which the last may be padded. Each of them predicts at least one token."""
        return -(-(self.num_tokens - 1) // self.sequence_length)

    def rows(self, indices: Integer[np.ndarray, " B"]) -> Batch:
        """Gathers rows by index, in any order; an index of −1 gives a row of padding.

        Raises:
          IndexError: an index is outside −1 … num_sequences − 1.
        """
        if len(indices) and (indices.min() < -1 or indices.max() >= self.num_sequences):
            raise IndexError(f"row indices must be in -1..{self.num_sequences - 1}; got {indices}")
        # A position past the end, T + 1 of them, stands for padding.
        starts = np.where(indices < 0, self.num_tokens, indices.astype(np.int64) * self.sequence_length)
        positions = starts[:, None] + np.arange(self.sequence_length + 1)
        valid = positions < self.num_tokens
        window = self.stream[np.where(valid, positions, 0)].astype(np.int32)
        window[~valid] = self.bos_id

        tokens, targets, is_bos = window[:, :-1], window[:, 1:], window == self.bos_id
        # A row that goes on with a document begins with segment 1 all the same.
        segment_ids = np.cumsum(is_bos[:, :-1], axis=1, dtype=np.int32) + ~is_bos[:, :1]
        segment_ids = np.where(valid[:, :-1], segment_ids, 0).astype(np.int32)
        return Batch(
            np.ascontiguousarray(tokens),
            np.ascontiguousarray(targets),
            segment_ids,
            1 - is_bos[:, 1:].astype(np.float32),
        )


class Stream(NamedTuple):
    """A packed split before it is cut into rows."""

    tokens: Integer[np.ndarray, " num_tokens"]
    num_documents: int


SplitName = Literal["train", "validation"]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "validation")


def pack_documents(documents: Sequence[bytes], tokenizer: Tokenizer) -> Stream:
    """Tokenizes documents and joins them, each after one BOS; uint16, or uint32 where that is too small."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    bos = np.array([tokenizer.bos_id], dtype)
    pieces: list[np.ndarray] = []
    for ids in tokenizer.encode(documents):
        pieces += [bos, ids.astype(dtype)]
    return Stream(np.concatenate(pieces), len(documents))


def load_or_pack(
    documents: Callable[[], tuple[Sequence[bytes], Sequence[bytes]]],
    documents_key: str,
    tokenizer: Tokenizer,
    folder: pathlib.Path,
) -> tuple[str, dict[SplitName, Stream]]:
    """The streams of both splits from the cache `folder`, or packed now and put there; with their content
    key.

    `documents` gives the documents to train on and those held out; it is called only when there is no sound
    cache entry. An entry is a manifest, written last, and one `.npy` file per split, whose SHA-256 the
    manifest holds: an entry half-written, damaged or of another key is packed again. Two processes may pack
    at once: both write the same bytes, each file in one step.
    """
    key = content_key("stream", PACKING_VERSION, documents_key, tokenizer.fingerprint)
    streams = _read_cached(folder, key)
    if streams is not None:
        return key, streams
    manifest: dict[str, Any] = {"key": key}
    for name, split in zip(SPLIT_NAMES, documents(), strict=True):
        stream = pack_documents(split, tokenizer)
        path = _stream_path(folder, key, name)
        write_atomically(path, functools.partial(np.save, arr=stream.tokens, allow_pickle=False))
        manifest[name] = {"num_documents": stream.num_documents, "sha256": file_sha256(path)}
    write_atomically(_manifest_path(folder, key), lambda file: file.write(json.dumps(manifest).encode()))
    streams = _read_cached(folder, key)
    if streams is None:
        raise ValueError(
            f"cache_dir {str(folder)!r} does not give back what was written to it. Name another folder."
        )
    return key, streams


def _stream_path(folder: pathlib.Path, key: str, name: SplitName) -> pathlib.Path:
    return folder / f"stream-{key}.{name}.npy"


def _manifest_path(folder: pathlib.Path, key: str) -> pathlib.Path:
    return folder / f"stream-{key}.json"


def _read_cached(folder: pathlib.Path, key: str) -> dict[SplitName, Stream] | None:
    """The streams, memory-mapped, or None where the entry is missing, damaged or of another key."""
    streams: dict[SplitName, Stream] = {}
    try:
        manifest = json.loads(_manifest_path(folder, key).read_bytes())
        if manifest["key"] != key:
            return None
        for name in SPLIT_NAMES:
            path = _stream_path(folder, key, name)
            if file_sha256(path) != manifest[name]["sha256"]:
                return None
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
            streams[name] = Stream(tokens, manifest[name]["num_documents"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return streams
