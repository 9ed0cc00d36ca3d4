import dataclasses

import numpy as np
import pytest
import torch
from datasets import Array3D, ClassLabel, Dataset, Features, Image, IterableDataset, Value
from PIL import Image as Pictures

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.selection.images import read_images
from hfshrink.selection.matching import mean_gap
from hfshrink.selection.random_networks import random_convnet
from hfshrink.selection.selection_report import SelectionReport
from hfshrink.selection.subset import Subset
from hfshrink.selection.synthesis import synthesize
from hfshrink.selection.synthetic import Synthetic
from tests import tiny

GENERATOR = np.random.default_rng(0)
CLASSES = np.arange(40) % 2
FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
TEXTS = Dataset.from_dict({"text": [f"row {i}" for i in range(40)], "label": CLASSES.tolist()}, features=FEATURES)
POINTS = (GENERATOR.normal(size=(40, 6)) + 3 * np.eye(6)[CLASSES]).astype(np.float32)
GREY = GENERATOR.integers(0, 100, size=(40, 8, 8)).astype(np.uint8) + 100 * CLASSES[:, None, None].astype(np.uint8)
PICTURES = Dataset.from_dict(
    {"image": [Pictures.fromarray(image) for image in GREY], "label": CLASSES.tolist()},
    features=Features({"image": Image(), "label": ClassLabel(names=["dark", "light"])}),
)
QUICK = {"steps": 6, "width": 8, "batch_rows": 8}


def with_pixels(values, kind="float32"):
    shape = np.asarray(values[0]).shape
    features = Features({"pixel_values": Array3D(shape, kind), "label": Value("int64")})
    return Dataset.from_dict({"pixel_values": list(values), "label": CLASSES.tolist()}, features=features)


def with_files(values):
    images = [None if value is None else Pictures.fromarray(value) for value in values]
    return Dataset.from_dict({"image": images, "label": CLASSES.tolist()}).cast_column("image", Image())


@pytest.mark.parametrize("method", ["distribution", "gradient"])
def test_texts_are_real_rows_with_soft_labels(method):
    subset = synthesize(TEXTS, 3, method, embeddings=POINTS, **QUICK)
    assert isinstance(subset, Subset)
    assert np.all(np.diff(subset.indices) > 0)
    assert subset.dataset["text"][:] == [f"row {i}" for i in subset.indices]
    assert np.bincount(subset.dataset["label"][:]).tolist() == [3, 3]
    assert subset.scores is None
    assert subset.learnt.shape == (6, 6)
    logits = np.array(subset.dataset["teacher_logits"][:])
    assert logits.shape == (6, 2)
    assert (logits.argmax(axis=1) == CLASSES[subset.indices]).all()  # the classes lie far apart
    report = subset.report
    assert (report.method, report.used, report.rows, report.size) == (f"{method}-matching",) * 2 + (40, 6)
    assert report.details["teacher"]["labels"] == ["bad", "good"]
    assert report.details["synthesis"]["space"] == "embeddings"
    assert [(share.name, share.full, share.kept) for share in report.balance] == [("bad", 20, 3), ("good", 20, 3)]
    assert SelectionReport.from_dict(report.to_dict()) == report
    assert method in str(subset)


def test_learnt_embeddings_belong_to_their_rows():
    subset = synthesize(TEXTS, 4, embeddings=POINTS, normalize=False, steps=1, rate=1e-6)
    assert not np.isnan(subset.learnt).any()
    ours = np.linalg.norm(subset.learnt.mean(axis=0) - POINTS.mean(axis=0))
    assert ours < np.linalg.norm(POINTS.mean(axis=0))  # in the coordinates of the embeddings
    far = np.linalg.norm(
        subset.learnt[:, None] - np.stack([POINTS[c == CLASSES].mean(axis=0) for c in (0, 1)]), axis=2
    )
    assert (far.argmin(axis=1) == CLASSES[subset.indices]).all()


def test_one_seed_gives_one_result():
    first, again, other = (synthesize(TEXTS, 3, embeddings=POINTS, seed=seed, **QUICK) for seed in (1, 1, 2))
    assert np.array_equal(first.learnt, again.learnt)
    assert first.indices.tolist() == again.indices.tolist()
    assert first.dataset["teacher_logits"][:] == again.dataset["teacher_logits"][:]
    assert not np.array_equal(first.learnt, other.learnt)


def test_global_generator_stays():
    state = torch.random.get_rng_state()
    synthesize(TEXTS, 2, embeddings=POINTS, **QUICK)
    synthesize(PICTURES, 1, **QUICK)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_model_embeds_the_rows():
    network = tiny.model("bert")
    rows = TEXTS.map(lambda row: {"input_ids": [2, 5 + len(row["text"]), 3]})
    subset = synthesize(rows, 2, model=network, soft_labels=False, **QUICK)
    assert subset.learnt.shape == (4, 16)
    assert "teacher_logits" not in subset.dataset.column_names
    assert "embeddings" in subset.report.seconds
    assert subset.report.model is not None


def test_a_class_without_rows_gets_no_chance():
    rows = TEXTS.cast_column("label", ClassLabel(names=["bad", "good", "never"]))
    logits = np.array(synthesize(rows, 2, embeddings=POINTS, **QUICK).dataset["teacher_logits"][:])
    assert logits.shape == (4, 3)
    assert (torch.from_numpy(logits).softmax(dim=1)[:, 2] == 0).all()


def test_names_can_be_labels():
    rows = TEXTS.remove_columns("label").add_column("label", [["no", "yes"][c] for c in CLASSES])
    subset = synthesize(rows, 2, embeddings=POINTS, **QUICK)
    assert [share.name for share in subset.report.balance] == ["no", "yes"]


def test_saved_and_loaded_subset_with_learnt_embeddings_is_the_same(tmp_path):
    subset = synthesize(TEXTS, 2, embeddings=POINTS, **QUICK)
    subset.save(tmp_path / "s")
    loaded = Subset.load(tmp_path / "s", TEXTS)
    assert np.array_equal(loaded.learnt, subset.learnt)
    assert loaded.indices.tolist() == subset.indices.tolist()
    np.save(tmp_path / "s" / "learnt.npy", np.zeros((3, 2)))
    with pytest.raises(CheckpointError, match=r"must hold 4 vectors.*got float64 of shape \(3, 2\)"):
        Subset.load(tmp_path / "s", TEXTS)


@pytest.mark.parametrize("rows", [PICTURES, with_pixels(GREY[:, None], "uint8")], ids=["files", "arrays"])
def test_saved_and_loaded_images_are_the_same(rows, tmp_path, capsys):
    synthetic = synthesize(rows, 1, **QUICK)
    synthetic.save(tmp_path / "s")
    loaded = Synthetic.load(tmp_path / "s")
    assert loaded.dataset.features == synthetic.dataset.features == rows.features
    column = rows.column_names[0]
    assert np.array_equal(np.array(loaded.dataset[column][:]), np.array(synthetic.dataset[column][:]))
    assert loaded.dataset["label"][:] == [0, 1]
    assert loaded.report == synthetic.report
    assert capsys.readouterr().err == ""  # no bars of datasets
    with pytest.raises(CheckpointError, match="not empty"):
        synthetic.save(tmp_path / "s")


def test_broken_saved_images_are_told(tmp_path):
    with pytest.raises(CheckpointError, match="Give the folder that Synthetic.save wrote"):
        Synthetic.load(tmp_path)
    synthesize(PICTURES, 1, **QUICK).save(tmp_path / "s")
    PICTURES.select(range(3)).to_parquet(tmp_path / "s" / "rows.parquet")
    with pytest.raises(CheckpointError, match="must hold 2 images, as the report says, got 3"):
        Synthetic.load(tmp_path / "s")
    (tmp_path / "s" / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(CheckpointError, match="Can't read"):
        Synthetic.load(tmp_path / "s")


@pytest.mark.parametrize("method", ["distribution", "gradient"])
def test_images_are_learned_in_their_own_form(method):
    synthetic = synthesize(PICTURES, 2, method, **QUICK)
    assert isinstance(synthetic, Synthetic)
    assert synthetic.dataset["label"][:] == [0, 0, 1, 1]
    assert synthetic.dataset.features == PICTURES.features
    assert {image.size for image in synthetic.dataset["image"]} == {(8, 8)}
    assert len(synthetic) == synthetic.report.size == 4
    assert synthetic.report.details["synthesis"]["shape"] == [1, 8, 8]
    assert SelectionReport.from_dict(synthetic.report.to_dict()) == synthetic.report
    assert "learned images" in str(synthetic)
    again = synthesize(PICTURES, 2, method, **QUICK)
    assert [np.asarray(image).tolist() for image in again.dataset["image"]] == [
        np.asarray(image).tolist() for image in synthetic.dataset["image"]
    ]


def test_learned_images_match_their_class_in_fresh_networks_better_than_those_they_started_as():
    stripes = np.stack([np.tile([0, 160], (8, 4)), np.tile([0, 160], (8, 4)).T])
    rows = with_pixels((stripes[CLASSES] + GENERATOR.integers(0, 200, size=(40, 8, 8)))[:, None])
    real = torch.from_numpy(read_images(rows, "pixel_values").normalized(np.argsort(CLASSES, kind="stable")))
    scale = read_images(rows, "pixel_values")

    def gap(**settings):
        learned = synthesize(rows, 1, width=16, batch_rows=20, **settings).dataset["pixel_values"][:]
        pixels = torch.from_numpy((np.array(learned, dtype=np.float32) - scale.mean) / scale.deviation)
        bodies = [random_convnet((1, 8, 8), 2, 16, seed).body for seed in range(900, 920)]
        with torch.no_grad():
            told = [(body(real).unflatten(0, (2, 20)), body(pixels)[:, None]) for body in bodies]
            return sum(mean_gap(*pair).item() for ours, theirs in told for pair in zip(ours, theirs, strict=True))

    assert gap(steps=40) < 0.8 * gap(steps=1, rate=1e-9)


def test_images_without_learning_are_real_ones():
    synthetic = synthesize(PICTURES, 3, steps=1, rate=1e-9, width=4, batch_rows=4)
    real = {(image.tobytes(), label) for image, label in zip(GREY, CLASSES, strict=True)}
    learned = {
        (np.asarray(image).tobytes(), label)
        for image, label in zip(synthetic.dataset["image"], synthetic.dataset["label"], strict=True)
    }
    assert len(learned) == 6
    assert learned <= real


@pytest.mark.parametrize("form", [(3, 8, 8), (8, 8, 3)])
def test_arrays_keep_their_form_and_their_range(form):
    values = GENERATOR.random((40, *form)).astype(np.float32)
    synthetic = synthesize(with_pixels(values), 2, **QUICK)
    learned = np.array(synthetic.dataset["pixel_values"][:])
    assert learned.shape == (4, *form)
    assert learned.min() >= values.min() - 1e-4
    assert learned.max() <= values.max() + 1e-4


def test_whole_numbers_stay_whole():
    synthetic = synthesize(with_pixels(GREY[:, None], "uint8"), 1, **QUICK)
    assert np.array(synthetic.dataset["pixel_values"][:]).dtype.kind in "iu"


def test_normalized_pixels_have_mean_0_and_deviation_1():
    pixels = read_images(PICTURES, "image").normalized(np.arange(40))
    assert pixels.shape == (40, 1, 8, 8)
    assert abs(pixels.mean()) < 1e-5
    assert pixels.std() == pytest.approx(1, abs=1e-5)


def test_a_sample_of_images_has_enough_of_a_small_class(monkeypatch):
    monkeypatch.setattr("hfshrink.selection.synthesis.MOST_NUMBERS", 20 * 64)
    rows = PICTURES.map(lambda row, place: {"label": int(place < 3)}, with_indices=True)
    assert synthesize(rows, 3, **QUICK).dataset["label"][:] == [0, 0, 0, 1, 1, 1]


def test_one_colour_image_among_grey_ones_makes_all_colour():
    images = [Pictures.fromarray(image) for image in GREY]
    images[39] = images[39].convert("RGBA")
    rows = Dataset.from_dict({"image": images}).cast_column("image", Image())
    assert read_images(rows, "image").pixels.shape == (40, 3, 8, 8)
    assert read_images(rows.select(range(39)), "image").pixels.shape == (39, 1, 8, 8)


def test_undecoded_images_are_read():
    undecoded = PICTURES.cast_column("image", Image(decode=False))
    assert np.array_equal(read_images(undecoded, "image").pixels, read_images(PICTURES, "image").pixels)


def test_truth_values_stay_truth_values():
    learned = synthesize(with_pixels((GREY > 100)[:, None], "bool"), 1, **QUICK).dataset["pixel_values"][:]
    assert np.array(learned).dtype == bool


def test_channels_that_never_change_are_learned_as_they_are():
    values = GENERATOR.random((40, 2, 8, 8)).astype(np.float32)
    values[:, 1] = 0.1
    learned = np.array(synthesize(with_pixels(values), 2, **QUICK).dataset["pixel_values"][:], dtype=np.float32)
    assert np.allclose(learned[:, 1], 0.1, atol=1e-6)


def test_of_many_images_a_sample_is_read(monkeypatch):
    monkeypatch.setattr("hfshrink.selection.synthesis.MOST_NUMBERS", 20 * 64)
    synthetic = synthesize(PICTURES, 2, **QUICK)
    assert "Learned from a sample of 20 of the 40 images." in synthetic.report.notes


@pytest.mark.parametrize(
    ("rows", "keywords", "match"),
    [
        (TEXTS, {}, "Found no images among text, label. For texts and other rows pass model="),
        (PICTURES.remove_columns("label"), {}, "found no column with one class a row among image"),
        (PICTURES.map(lambda row: {"label": 0}), {}, r"Expected two classes or more in 'label', got \[0\]"),
        (PICTURES, {"per_class": 21}, "per_class=21, but the class 'dark' of 'label' has 20 rows"),
        (PICTURES, {"per_class": 0}, "per_class must be a whole number from 1 on, got 0"),
        (PICTURES, {"steps": 0}, "steps must be a whole number from 1 on, got 0"),
        (PICTURES, {"rate": -1}, "rate must be a number in"),
        (PICTURES, {"seed": -1}, "seed must be a whole number from 0 on, got -1"),
        (PICTURES, {"normalize": True}, "in the space of images does not know 'normalize'"),
        (TEXTS, {"embeddings": POINTS, "normalize": "no"}, "normalize must be True, False or None, got 'no'"),
        (with_files(GREY.astype(np.uint16)), {}, r"Image 0 has more than 8 bits a pixel \(mode 'I;16'\)"),
        (with_files([*GREY[:39], None]), {}, "Image 39 is None"),
        (PICTURES, {"method": "trajectory"}, "method must be one of distribution, gradient, got 'trajectory'"),
        (PICTURES, {"model": "a", "embeddings": POINTS}, "Give either model= or embeddings=, got both"),
        (IterableDataset.from_generator(lambda: iter(())), {}, "got a streaming one"),
        (TEXTS, {"embeddings": POINTS[:39]}, "one row for each of the 40 labels or texts, got 39"),
        (TEXTS, {"embeddings": np.where(np.arange(6) == 2, np.nan, POINTS)}, "embedding of row 0 holds NaN"),
        (with_pixels([np.zeros((1, 65, 65))] * 40), {}, r"at most 64 × 64 pixels can be learned, got \(1, 65, 65\)"),
        (with_pixels([np.zeros((1, 3, 8))] * 40), {}, "sides of at least 4 pixels"),
        (with_pixels([np.full((1, 8, 8), np.nan)] * 40), {}, "Image 0 in 'pixel_values' holds NaN"),
    ],
)
def test_bad_input_is_refused_before_work(rows, keywords, match):
    with pytest.raises(SettingError, match=match):
        synthesize(rows, **{"per_class": 2, **keywords})


def test_images_of_different_shapes_are_refused():
    rows = with_files([np.zeros((8, 8 + (i == 7)), np.uint8) for i in range(40)])
    with pytest.raises(SettingError, match=r"image 0 has \(8, 8, 3\), image 7 \(8, 9, 3\). Resize the images"):
        synthesize(rows, 1)


def test_equal_embeddings_teach_nothing():
    subset = synthesize(TEXTS, 2, embeddings=np.ones((40, 6), np.float32), **QUICK)
    assert np.allclose(subset.dataset["teacher_logits"][:], 0, atol=1e-3)


def test_too_large_embeddings_are_told():
    huge = (POINTS * 1e30).astype(np.float32)
    with pytest.raises(SettingError, match="overflow float32"):
        synthesize(TEXTS, 2, embeddings=huge, normalize=False, **QUICK)


def test_results_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        synthesize(TEXTS, 1, embeddings=POINTS, **QUICK).learnt = None
