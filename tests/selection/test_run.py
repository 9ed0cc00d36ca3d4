import logging

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from hfshrink.errors import SettingError
from hfshrink.selection.caching import column_digests
from hfshrink.selection.coresets import herding, kmeans_subset
from hfshrink.selection.datamap import DataMap
from hfshrink.selection.embeddings import embed
from hfshrink.selection.methods import METHODS
from hfshrink.selection.run import hub_source, only_rows, select
from hfshrink.selection.selection_report import SelectionReport
from hfshrink.selection.strata import ccs
from hfshrink.selection.subset import Subset
from tests import tiny

CLASSES = np.repeat([0, 1, 2], [24, 12, 4])
GENERATOR = np.random.default_rng(0)
POINTS = (GENERATOR.normal(size=(40, 5)) + 3 * np.eye(5)[CLASSES]).astype(np.float32)
SCORES = GENERATOR.random(40)
SIZES = ((0, 24), (1, 12), (2, 4))
FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
ROWS = Dataset.from_dict({"text": [f"row {i}" for i in range(40)], "label": CLASSES.tolist()}, features=FEATURES)
QUICK = {"seeds": 1, "epochs": 3}


def keywords(method):
    needs = METHODS[method]
    return {
        **({"embeddings": POINTS} if needs.embeddings else {}),
        **({"scores": SCORES / 2} if needs.measure else {}),
    }


def data_map(rows=ROWS, **changes):
    parts = dict.fromkeys(("confidence", "variability", "correctness", "aum", "forgetting", "el2n"), SCORES / 2)
    return DataMap(**{**parts, "epochs": (1, 2), "columns": column_digests(rows), "model": "trained", **changes})


@pytest.mark.parametrize("method", METHODS)
def test_each_method_keeps_the_size_the_classes_and_the_order(method):
    subset = select(ROWS, 0.25, method, **keywords(method))
    assert len(subset) == len(subset.dataset) == subset.report.size == 10
    assert np.all(np.diff(subset.indices) > 0)
    assert [share.kept for share in subset.report.balance] == [6, 3, 1]
    assert subset.dataset["text"][:] == [f"row {i}" for i in subset.indices]
    assert SelectionReport.from_dict(subset.report.to_dict()) == subset.report
    again = select(ROWS, 0.25, method, **keywords(method))
    assert again.indices.tolist() == subset.indices.tolist()


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].measure])
def test_each_score_can_come_from_probes(method):
    subset = select(ROWS, 0.25, method, embeddings=POINTS, **QUICK)
    assert subset.scores.shape == (40,)
    assert np.isfinite(subset.scores).all()
    assert subset.report.scored_by == "probes on embeddings"
    assert subset.report.score == METHODS[method].measure


@pytest.mark.parametrize("method", METHODS)
def test_keeping_everything_changes_nothing(method):
    assert select(ROWS, 1, method, **keywords(method)).indices.tolist() == list(range(40))


def test_embeddings_of_texts_count_by_their_angle():
    subset = select(ROWS, 0.25, "herding", embeddings=POINTS)
    assert subset.indices.tolist() == herding(POINTS, 10, CLASSES, normalize=True).tolist()
    other = select(ROWS, 0.25, "herding", embeddings=POINTS, normalize=False)
    assert other.indices.tolist() == herding(POINTS, 10, CLASSES).tolist()
    assert other.report.settings["normalize"] is False


def test_options_reach_the_method():
    subset = select(ROWS, 0.25, "ccs", scores=SCORES, cutoff=0.5, strata=4, seed=7)
    assert subset.indices.tolist() == ccs(SCORES, 10, 0.5, 4, CLASSES, 7).tolist()


def test_size_says_the_same_as_fraction():
    assert select(ROWS, size=10, method="random").indices.tolist() == select(ROWS, 0.25, "random").indices.tolist()


def test_without_groups_all_rows_are_taken_alike():
    subset = select(ROWS, 0.1, "el2n", scores=SCORES, stratify=None)
    assert subset.indices.tolist() == sorted(np.argsort(-SCORES)[:4].tolist())


def test_another_column_can_be_stratified_by():
    rows = ROWS.add_column("source", ["rare"] * 2 + ["common"] * 38)
    subset = select(rows, 0.1, "random", stratify="source")
    shares = {(share.column, share.name): share.kept for share in subset.report.balance}
    assert shares["source", "rare"] == 1
    assert ("label", "a") in shares


def test_hardest_rows_are_the_planted_label_errors_and_coverage_leaves_them_out():
    generator = np.random.default_rng(1)
    truth = np.arange(300) % 2
    points = (generator.normal(size=(300, 4)) + 4 * truth[:, None]).astype(np.float32)
    wrong = generator.choice(300, 30, replace=False)
    labels = truth.copy()
    labels[wrong] ^= 1
    rows = Dataset.from_dict({"row": list(range(300)), "label": labels.tolist()})
    shares = {
        method: np.isin(select(rows, 0.1, method, embeddings=points, **QUICK).indices, wrong).mean()
        for method in ("hard", "el2n", "ccs", "easy")
    }
    assert min(shares["hard"], shares["el2n"]) > 0.6
    assert max(shares["ccs"], shares["easy"]) == 0
    assert np.isin(select(rows, 0.15, embeddings=points, **QUICK).indices, wrong).mean() < 0.05
    assert np.isin(select(rows, 0.3, embeddings=points, **QUICK).indices, wrong).mean() < 0.06  # of 5 % that are left


@pytest.mark.parametrize(
    ("fraction", "given", "used"),
    [
        (0.075, {"embeddings": POINTS, **QUICK}, "kmeans"),
        (0.45, {"embeddings": POINTS, **QUICK}, "kmeans"),
        (0.6, {"embeddings": POINTS, **QUICK}, "random"),
        (0.3, {"scores": SCORES}, "random"),
        (0.15, {"scores": SCORES}, "ccs"),
        (0.15, {"data_map": data_map()}, "ccs"),
    ],
)
def test_auto_tells_what_it_chose_and_why(fraction, given, used):
    subset = select(ROWS, fraction, **given)
    assert (subset.report.method, subset.report.used) == ("auto", used)
    assert "of the rows are kept" in subset.report.why
    assert f"auto → {used}" in str(subset)
    assert len(subset) == round(40 * fraction)


def test_auto_at_few_rows_is_k_means_on_what_the_hardest_rows_leave():
    unlabelled = select(ROWS.remove_columns("label"), 0.2, embeddings=POINTS)
    assert unlabelled.indices.tolist() == kmeans_subset(POINTS, 8, normalize=True).tolist()
    assert unlabelled.report.score is None
    subset = select(ROWS, size=3, embeddings=POINTS, scores=SCORES, score="el2n")
    hardest = [np.flatnonzero(c == CLASSES)[np.argsort(-SCORES[c == CLASSES])[: int(0.3 * n)]] for c, n in SIZES]
    left = np.setdiff1d(np.arange(40), np.concatenate(hardest))
    assert subset.indices.tolist() == left[kmeans_subset(POINTS[left], 3, CLASSES[left], normalize=True)].tolist()
    assert subset.report.score == "el2n"
    assert "the hardest 30 % of each class" in subset.report.why


def test_auto_below_ten_percent_keeps_wrong_labels_out_and_costs_nothing_without_them():
    generator = np.random.default_rng(3)
    truth = np.arange(600) % 2
    centres = generator.normal(size=(2, 6))
    points = (
        generator.normal(size=(600, 6)) + 4 * centres[truth] / np.linalg.norm(centres[truth], axis=1)[:, None]
    ).astype("f4")
    labels = truth.copy()
    wrong = generator.choice(600, 180, replace=False)
    labels[wrong] ^= 1
    shares = {}
    for name, given in (("clean", truth), ("wrong", labels)):
        rows = Dataset.from_dict({"row": list(range(600)), "label": given.tolist()})
        for method in ("auto", "kmeans"):
            picked = select(
                rows, 0.05, method, embeddings=points, coverage=False, **(QUICK if method == "auto" else {})
            )
            nearest = np.array([points[picked.indices[given[picked.indices] == c]].mean(axis=0) for c in (0, 1)])
            told = ((points[:, None] - nearest) ** 2).sum(axis=2).argmin(axis=1)
            shares[name, method] = (given[picked.indices] != truth[picked.indices]).mean(), (told == truth).mean()
    assert shares["wrong", "kmeans"][0] > 0.15
    assert shares["wrong", "auto"][0] < 0.05
    assert shares["wrong", "auto"][1] >= shares["wrong", "kmeans"][1]
    assert shares["clean", "auto"][1] >= shares["clean", "kmeans"][1] - 0.01


def test_auto_at_many_rows_drops_the_hardest_and_the_duplicates():
    scores = np.append(np.linspace(0, 1, 39), 100.0)
    rows = Dataset.from_dict({"text": ["same"] * 6 + [f"row {i}" for i in range(34)]})
    subset = select(rows, 0.5, scores=scores, embeddings=POINTS)
    assert 39 not in subset.indices
    assert sum(index < 6 for index in subset.indices) <= 1
    assert subset.report.settings["cutoff"] == 0.05
    assert 5 <= subset.report.duplicates["removed"] <= 10


def test_auto_with_nothing_to_judge_by_is_refused():
    with pytest.raises(SettingError, match="'auto' needs something to judge rows by"):
        select(ROWS, 0.3)


def test_subset_is_saved_and_loaded(tmp_path):
    subset = select(ROWS, 0.25, "ccs", scores=SCORES)
    subset.save(tmp_path / "subset")
    loaded = Subset.load(tmp_path / "subset", ROWS)
    assert loaded.report == subset.report
    assert loaded.dataset[:] == subset.dataset[:]


def test_model_embeds_the_rows_and_is_named(tmp_path):
    texts = ["good film", "bad plot", "the cat sings", "a dog eats fish", "great story", "poor dull movie"]
    rows = Dataset.from_dict({"text": texts, "label": [1, 0, 1, 0, 1, 0]})
    model, tokenizer = tiny.model("bert", "text-classification"), tiny.tokenizer()
    subset = select(rows, 0.7, "herding", model=model, processor=tokenizer, cache_dir=tmp_path, batch_size=2)
    vectors = embed(rows, model, tokenizer)
    assert subset.indices.tolist() == herding(vectors, 4, rows["label"], normalize=True).tolist()
    assert subset.report.model == "BertForSequenceClassification"
    assert set(subset.report.seconds) == {"duplicates", "scores", "embeddings", "selection", "coverage"}


def test_rows_of_a_language_model_are_picked_without_labels():
    ids = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 15]]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    subset = select(rows, 0.5, "k-center", model=tiny.model("gpt2"))
    assert len(subset) == 2
    assert subset.report.balance == ()


def test_rows_of_words_keep_their_rarest_tag():
    tags = [[0, 0]] * 9 + [[0, 1]]
    rows = Dataset.from_dict(
        {"tokens": [["the", word] for word in tiny.WORDS[:10]], "ner_tags": tags},
        features=Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["O", "PER"]))}),
    )
    for seed in range(3):
        subset = select(rows, 0.2, "random", seed=seed)
        assert 9 in subset.indices
    assert subset.report.balance[1].column == "ner_tags (rarest of a row)"
    assert subset.report.balance[1].name == "PER"
    with pytest.raises(SettingError, match="found not two classes, one a row, in 'ner_tags'"):
        select(rows, 0.2, "el2n", embeddings=POINTS[:10])


def test_images_are_picked_by_distance():
    images = [np.full((8, 8, 3), value, dtype=np.uint8) for value in (0, 10, 100, 110, 200, 210)]
    rows = Dataset.from_dict(
        {"image": images, "label": [0, 0, 0, 1, 1, 1]}, features=Features({"image": Image(), "label": Value("int64")})
    )
    subset = select(rows, 0.5, "k-center", embeddings=POINTS[:6])
    assert subset.report.settings["normalize"] is False
    assert subset.report.duplicates["rows"] == 0


def test_single_row_of_a_class_is_kept_with_a_warning(caplog):
    rows = Dataset.from_dict({"text": [f"row {i}" for i in range(20)], "label": [0] * 19 + [1]})
    with caplog.at_level(logging.WARNING):
        subset = select(rows, 0.1, "random")
    assert 19 in subset.indices
    assert "Classes with one row only" in caplog.text


def test_some_rows_of_a_large_array_go_through_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("hfshrink.selection.run.BLOCK_NUMBERS", 1)
    rows = np.arange(0, 40, 3)
    found = only_rows(POINTS, rows, str(tmp_path))
    assert isinstance(found, np.memmap)
    assert np.array_equal(found, POINTS[rows])
    assert only_rows(POINTS, np.arange(40), str(tmp_path)) is POINTS


def test_hub_source_is_read_from_the_addresses():
    rows = ROWS.select(range(3))
    commit = "0123456789" * 4
    rows.info.download_checksums = {f"hf://datasets/org/reviews@{commit}/train.parquet": {"num_bytes": 1}}
    assert hub_source(rows) == ("org/reviews", commit)
    report = select(rows, 1.0, "random").report
    assert (report.data, report.revision) == ("org/reviews", commit)


def test_data_set_without_a_name_has_none():
    report = select(ROWS, 0.25, "random").report
    assert (report.data, report.revision) == (None, None)


def test_data_set_may_lie_in_a_folder(tmp_path):
    ROWS.save_to_disk(tmp_path / "reviews")
    subset = select(str(tmp_path / "reviews"), 0.25, "random")
    assert subset.report.data == "reviews"
    assert len(Subset.load(saved(subset, tmp_path), ROWS)) == 10


def saved(subset, folder):
    subset.save(folder / "subset")
    return folder / "subset"
