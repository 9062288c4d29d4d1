"""The smallest model, data and options that the tests of the application share."""

import pathlib

import jax
import numpy as np

from train.config import ModelOptions, OptimizerOptions
from train.data import DataConfig
from train.ledger import write_atomically
from train.mesh import MeshShape, build_mesh

# One block of one 8-wide head; compiles in seconds.
MODEL = ModelOptions(layers=1, key_dim=8, value_dim=8, base_width=8)
OPTIMIZER = OptimizerOptions(weight_decay=0.1)


def one_device() -> jax.sharding.Mesh:
    """A mesh of the first device."""
    return build_mesh(MeshShape(), jax.devices()[:1])


def write_corpus(folder: pathlib.Path) -> pathlib.Path:
    """A text file of 60 documents in which letters predict each other."""
    rng = np.random.default_rng(3)
    words = ["abba", "cede", "fog", "hihi", "jot"]
    text = "\n\n".join(" ".join(rng.choice(words, 40)) for _ in range(60))
    path = folder / "corpus.txt"
    # Processes of one test write it at once: none may find it empty.
    write_atomically(path, text)
    return path


def data_config(folder: pathlib.Path, **options: object) -> DataConfig:
    """A data config over that corpus, cached in the folder."""
    settings = {"sequence_length": 16, "batch_size": 8, "validation_batches": 2, "validation_fraction": 0.2}
    return DataConfig(
        corpus=str(write_corpus(folder)), cache_dir=str(folder / "cache"), **(settings | options)
    )
