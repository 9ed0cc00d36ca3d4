"""Embeds tiny texts twice, with a cache and without; started by test_embeddings.py, alone or under torchrun.

Words: the folder of the cache and of the results.
"""

import sys
from pathlib import Path

import numpy as np

import tiny
import training
from hfshrink.selection import embeddings

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    embeddings.CHUNK_ROWS = 3
    rows = training.rows(10, "class")
    network = tiny.model("bert", seed=1)
    cached = embeddings.embed(rows, network, batch_size=2, cache_dir=folder / "cache")
    few = embeddings.embed(rows.select([4, 2]), network, batch_size=2)  # one chunk: a process has nothing to do
    plain = embeddings.embed(rows, network, batch_size=2)
    team = embeddings.Processes.current()
    np.savez(folder / f"found-{team.rank}.npz", cached=cached, plain=plain, few=few)
    if team.rank == 0:
        print(f"world={team.count}")  # noqa: T201
    training.leave_together()
