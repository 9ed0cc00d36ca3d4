"""What selection costs among a million rows: embeddings of 384 numbers in a file, k-means and k-center.

The rows are a random mixture of 200 normal clusters. K-means takes √n clusters and draws a tenth of the rows in
proportion; k-center takes 1,000. Each measurement is a process of its own; memory is the growth of what is resident
and not mapped from a file (RssAnon), read every 5 ms. Results are kept in runs/selection/scale; the embeddings are
deleted when all measurements of their size are there.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from common import ROOT, be_quiet, save

from hfshrink.terminal import table

KEPT = ROOT / "runs" / "selection" / "scale"
WIDTH, CENTRES, FRACTION = 384, 1000, 0.1
SIZES = (10_000, 100_000, 1_000_000)
METHODS = {"kmeans": "k-means, √n clusters, a tenth of the rows", "k-center": f"k-center, {CENTRES:,} rows"}


def embeddings_of(n):
    """The file of n rows, written block by block; about 1.5 GB of a million."""
    path = KEPT / f"{n}.npy"
    needed = 4 * n * WIDTH
    if path.is_file():
        return path
    KEPT.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(KEPT).free < 2 * needed:
        sys.exit(f"{needed / 1e9:.1f} GB are needed in {KEPT}, and as much should stay free.")
    generator, aside = np.random.default_rng(0), KEPT / f"{n}.part.npy"
    middles = generator.normal(size=(200, WIDTH)).astype(np.float32)
    array = np.lib.format.open_memmap(aside, mode="w+", dtype=np.float32, shape=(n, WIDTH))
    for start in range(0, n, 50_000):
        rows = slice(start, min(start + 50_000, n))
        count = rows.stop - rows.start
        noise = generator.standard_normal(size=(count, WIDTH), dtype=np.float32)
        array[rows] = middles[generator.integers(len(middles), size=count)] + noise
    array.flush()
    aside.replace(path)
    return path


def resident_without_files():
    """Bytes of this process that are resident and not mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


@contextmanager
def peak_of_memory():
    """A list that holds the highest growth when the block is left."""
    before, found, stop = resident_without_files(), [0], threading.Event()

    def watch():
        while not stop.wait(0.005):
            found[0] = max(found[0], resident_without_files() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def measure(method, n):
    """Print what one selection costs, in this fresh process."""
    from datasets import Dataset

    from hfshrink.selection import select

    be_quiet(int(os.environ.get("OMP_NUM_THREADS", "1")))
    vectors, rows = np.load(embeddings_of(n), mmap_mode="r"), Dataset.from_dict({"number": np.arange(n)})
    how = {"embeddings": vectors, "stratify": None, "method": method, "deduplicate": False, "coverage": False}
    how |= {"size": CENTRES} if method == "k-center" else {"fraction": FRACTION, "clusters": math.isqrt(n)}
    select(rows.select(range(2000)), **{**how, "embeddings": vectors[:2000], "size": 100, "fraction": None})  # imports
    start = time.perf_counter(), time.process_time()
    with peak_of_memory() as peak:
        subset = select(rows, **how)
    spent = time.perf_counter() - start[0], time.process_time() - start[1]
    stages = {stage: round(seconds, 2) for stage, seconds in subset.report.seconds.items()}
    found = {"rows": n, "kept": len(subset), "seconds": spent[0], "cpu_seconds": spent[1], "peak_bytes": peak[0]}
    print(json.dumps({**found, "stages": stages, "threads": os.environ.get("OMP_NUM_THREADS")}))


def render():
    """Write results/selection_scale.json and .md."""
    found, lines = {}, []
    for method, title in METHODS.items():
        results = [json.loads(path.read_text()) for path in KEPT.glob(f"{method}-*.json")]
        found[method] = sorted(results, key=lambda result: result["rows"])
        for result in found[method]:
            per_row = 1e6 * result["cpu_seconds"] / result["rows"]
            size = 4e-6 * result["rows"] * WIDTH
            numbers = [f"{result[name]:.1f}" for name in ("cpu_seconds", "seconds")]
            memory = f"{result['peak_bytes'] / 1e6:.0f}"
            lines.append((title, f"{result['rows']:,}", *numbers, f"{per_row:.0f}", memory, f"{size:,.0f}"))
    header = ("method", "rows", "CPU seconds", "seconds", "CPU µs a row", "memory, MB", "the embeddings, MB")
    threads = sorted({str(result["threads"]) for results in found.values() for result in results})
    text = (
        f"Embeddings of {WIDTH} float32 numbers, memory-mapped; threads: {', '.join(threads)}. Memory is the highest "
        "growth of the process without mapped pages. Seconds by the clock are those of a machine that may have been "
        "busy with other work; CPU seconds are the process's own."
    )
    save("selection_scale", {"methods": found}, f"{text}\n\n{table(header, lines)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, nargs="+", default=SIZES, help="numbers of rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", choices=METHODS, help="measure here, and print what is found")
    parser.add_argument("--render", action="store_true", help="measure nothing: write the table of what is there")
    options = parser.parse_args()
    if options.one:
        measure(options.one, options.n[0])
        return
    for n in () if options.render else options.n:
        for method in METHODS:
            path = KEPT / f"{method}-{n}.json"
            if not path.is_file():
                embeddings_of(n)
                command = [sys.executable, __file__, "--one", method, "--n", str(n)]
                environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
                run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                path.write_text(run.stdout.splitlines()[-1] + "\n")
                print(f"{method} {n:,}: {run.stdout.splitlines()[-1]}", flush=True)
        (KEPT / f"{n}.npy").unlink(missing_ok=True)
    render()


if __name__ == "__main__":
    main()
