"""The data map inside a Trainer: equal to slow passes, without a trace in training, resumed, and its likely errors."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, EarlyStoppingCallback, Trainer, TrainerCallback

import tiny
import training
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.labels import next_token_labels
from hfshrink.selection.datamap import MEASURES, DataMap
from hfshrink.selection.datamap_callback import DataMapCallback
from hfshrink.selection.datamap_measures import RunningMeasures, row_measures

ROWS = 14  # no multiple of a batch; four steps an epoch


class KeepWeights(TrainerCallback):
    """The weights at each epoch's end, as a checkpoint would hold them."""

    def __init__(self):
        self.states = []

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.states.append({name: value.clone() for name, value in model.state_dict().items()})


class StopAt(TrainerCallback):
    """Ends training after a step, as a killed run that had saved its checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step >= self.step


def images(count=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, 8, 8, generator=generator)
    return Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": [i % 2 for i in range(count)]})


def run(network, data, callbacks=(), resume=None, collate=training.collate, **arguments):
    settings = {"max_steps": -1, "num_train_epochs": 3, "lr_scheduler_type": "constant", **arguments}
    trainer = Trainer(
        network,
        training.arguments(**settings),
        train_dataset=data,
        data_collator=collate,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def slow_map(network, states, data, is_causal=False, every=1):
    """One row at a time, by the weights of each epoch's end."""
    found = RunningMeasures(len(data))
    for epoch, state in enumerate(states, start=1):
        network.load_state_dict(state)
        network.eval()
        if epoch % every:
            continue
        measured = []
        for row in range(len(data)):
            batch = training.collate([data[row]])
            labels = batch.pop("labels")
            logits = tiny.logits(network, batch)
            labels, logits = (labels[:, 1:], logits[:, :-1]) if is_causal else (labels, logits)
            measured.append(row_measures(logits, labels))
        found.add(epoch, {name: torch.cat([row[name] for row in measured]).numpy() for name in measured[0]})
    return found.arrays()


def check_equal(data_map, expected, exact=False):
    for name in MEASURES:
        one, two = (getattr(side, name) if isinstance(side, DataMap) else side[name] for side in (data_map, expected))
        assert np.array_equal(one, two, equal_nan=True) if exact else one == pytest.approx(two, abs=1e-5), name


CASES = {
    "text": ("bert", "text-classification", training.rows(ROWS, "class")),
    "images": ("resnet", None, images()),
    "tokens": ("bert", "token-classification", training.rows(ROWS, "tokens")),
    "causal": ("llama", None, training.rows(ROWS, "causal")),
}


@pytest.mark.parametrize(("case", "every"), [*((case, 1) for case in CASES), ("text", 2)])
def test_the_map_equals_slow_passes_over_saved_weights(case, every):
    """With shuffled rows, accumulated gradients, dropout, padded batches, and running statistics of a ResNet."""
    family, task, data = CASES[case]
    weights, callback = KeepWeights(), DataMapCallback(every=every, batch_size=5)
    network = tiny.model(family, task, seed=1)
    run(network, data, [callback, weights], gradient_accumulation_steps=2, num_train_epochs=4)
    found = callback.data_map
    assert found.epochs == ((1, 2, 3, 4) if every == 1 else (2, 4))
    expected = slow_map(network, weights.states, data, is_causal=case == "causal", every=every)
    check_equal(found, expected)
    assert len(np.unique(found.confidence)) > 2
    if case in ("text", "images"):
        assert found.labels.tolist() == data["labels"]
        assert found.predicted.tolist() == expected["predicted"].tolist()
    else:
        assert found.labels is None
        assert found.predicted is None


@pytest.mark.parametrize(
    "case", ["text", *(pytest.param(case, marks=pytest.mark.slow) for case in ("images", "causal"))]
)
def test_training_with_the_callback_is_bitwise_the_same(case):
    family, task, data = CASES[case]
    ends = []
    for callbacks in ([], [DataMapCallback(batch_size=3)]):
        torch.manual_seed(5)
        dropout = {"attention_dropout": 0.2} if family == "llama" else {}
        network = tiny.model(family, task, seed=1, **dropout)
        trainer = run(network, data, callbacks, gradient_accumulation_steps=2, optim="adamw_torch")
        ends.append((network.state_dict(), trainer.state.log_history[-1]["train_loss"], torch.rand(3)))
        assert network.training
    (one, loss, draws), (two, other_loss, other_draws) = ends
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert loss == other_loss
    assert torch.equal(draws, other_draws)


def test_modules_that_someone_put_into_eval_mode_stay_so():
    network, flags = tiny.model("bert", seed=1), []

    class Frozen(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            model.bert.embeddings.eval()

        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            flags.append((model.training, model.bert.embeddings.training, model.bert.encoder.training))

    run(network, training.rows(8), [DataMapCallback(), Frozen()], num_train_epochs=1)
    assert flags == [(True, False, True)]


@pytest.mark.parametrize("stop", [pytest.param(4, marks=pytest.mark.slow), 6])
def test_a_resumed_run_makes_the_same_map(tmp_path, stop):
    """Four steps are an epoch: stopped at its end, and in the middle of the next; dropout is on."""
    data = training.rows(ROWS)
    whole, parts = DataMapCallback(), [DataMapCallback(), DataMapCallback()]
    run(tiny.model("bert", seed=1), data, [whole], output_dir=str(tmp_path / "whole"), num_train_epochs=3)
    settings = {"output_dir": str(tmp_path / "part"), "num_train_epochs": 3}
    run(tiny.model("bert", seed=1), data, [parts[0], StopAt(stop)], **settings)
    assert parts[0].data_map.epochs == (1,)
    run(tiny.model("bert", seed=2), data, [parts[1]], resume=str(tmp_path / f"part/checkpoint-{stop}"), **settings)
    assert parts[1].data_map.epochs == (1, 2, 3)
    check_equal(parts[1].data_map, whole.data_map, exact=True)
    check_equal(DataMap.load(tmp_path / "part" / "data_map"), whole.data_map, exact=True)


@pytest.mark.slow
def test_resuming_from_an_earlier_checkpoint_forgets_the_epochs_after_it(tmp_path):
    data, first, second = training.rows(ROWS), DataMapCallback(), DataMapCallback()
    settings = {"output_dir": str(tmp_path), "num_train_epochs": 3, "save_strategy": "epoch"}
    run(tiny.model("bert", seed=1), data, [first], **settings)
    run(tiny.model("bert", seed=1), data, [second], resume=str(tmp_path / "checkpoint-4"), **settings)
    assert second.data_map.epochs == (1, 2, 3)
    check_equal(second.data_map, first.data_map, exact=True)


@pytest.mark.slow
def test_an_epoch_whose_end_a_killed_run_never_reached_is_made_up_for(tmp_path):
    """The checkpoint of the last step of an epoch is written before the epoch's end."""
    data, first, second = training.rows(ROWS), DataMapCallback(), DataMapCallback()
    settings = {"output_dir": str(tmp_path), "num_train_epochs": 2, "save_strategy": "epoch"}
    run(tiny.model("bert", seed=1), data, [first], **settings)
    (tmp_path / "data_map" / "epochs" / "epoch-00001.safetensors").unlink()
    run(tiny.model("bert", seed=1), data, [second], resume=str(tmp_path / "checkpoint-4"), **settings)
    check_equal(second.data_map, first.data_map, exact=True)


@pytest.mark.slow
def test_a_resumed_run_without_its_files_says_so_and_goes_on(tmp_path, caplog):
    data, late = training.rows(ROWS), DataMapCallback()
    settings = {"output_dir": str(tmp_path), "num_train_epochs": 3, "save_strategy": "epoch"}
    run(tiny.model("bert", seed=1), data, **settings)
    with caplog.at_level(logging.WARNING):
        run(tiny.model("bert", seed=1), data, [late], resume=str(tmp_path / "checkpoint-8"), **settings)
    assert "has no file of the epochs [1]" in caplog.text
    assert late.data_map.epochs == (2, 3)


def test_a_resumed_run_on_other_rows_is_refused(tmp_path):
    settings = {"output_dir": str(tmp_path), "num_train_epochs": 2, "save_strategy": "epoch"}
    run(tiny.model("bert", seed=1), training.rows(ROWS), [DataMapCallback()], **settings)
    with pytest.raises(CheckpointError, match="was made of other rows than this run's 14"):
        run(
            tiny.model("bert", seed=1),
            training.rows(ROWS, seed=1),
            [DataMapCallback()],
            resume=str(tmp_path / "checkpoint-4"),
            **settings,
        )


@pytest.mark.slow
def test_a_run_from_the_start_replaces_an_older_map(tmp_path):
    settings = {"output_dir": str(tmp_path)}
    run(tiny.model("bert", seed=1), training.rows(ROWS), [DataMapCallback()], num_train_epochs=3, **settings)
    other = DataMapCallback()
    run(tiny.model("bert", seed=1), training.rows(8, seed=1), [other], num_train_epochs=1, **settings)
    assert len(DataMap.load(tmp_path / "data_map")) == 8
    assert [path.name for path in (tmp_path / "data_map" / "epochs").iterdir()] == ["epoch-00001.safetensors"]


def test_training_twice_makes_two_maps():
    callback = DataMapCallback()
    trainer = run(tiny.model("bert", seed=1), training.rows(8), [callback], num_train_epochs=2)
    first = callback.data_map
    trainer.train()
    assert callback.data_map.epochs == first.epochs == (1, 2)
    assert callback.data_map.confidence.tolist() != first.confidence.tolist()


@pytest.mark.slow
def test_early_stopping_ends_the_map(tmp_path):
    callback, data = DataMapCallback(), training.rows(ROWS)
    trainer = Trainer(
        tiny.model("bert", seed=1),
        training.arguments(
            output_dir=str(tmp_path),
            max_steps=-1,
            num_train_epochs=20,
            learning_rate=0.0,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_only_model=True,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
        ),
        train_dataset=data,
        eval_dataset=data,
        data_collator=training.collate,
        callbacks=[callback, EarlyStoppingCallback(2)],
    )
    trainer.train()
    assert callback.data_map.epochs == (1, 2, 3)
    assert callback.data_map.variability == pytest.approx(np.zeros(ROWS)), "nothing was learned"


def test_a_part_of_an_epoch_is_no_epoch(caplog):
    callback = DataMapCallback()
    run(tiny.model("bert", seed=1), training.rows(ROWS), [callback], max_steps=6)
    assert callback.data_map.epochs == (1,)
    with caplog.at_level(logging.WARNING):
        run(tiny.model("bert", seed=1), training.rows(ROWS), [callback], max_steps=2)
    assert callback.data_map is None
    assert "There is no data map: training ended at epoch 0.5" in caplog.text


@pytest.mark.slow
def test_columns_that_the_model_does_not_take_change_nothing(tmp_path):
    """Given in the Trainer, which drops them, or to the callback."""
    data = training.rows(ROWS)
    full = data.add_column("text", ["a film"] * ROWS).rename_column("labels", "label")
    maps = []

    def collate(rows):
        assert set(rows[0]) == {"input_ids", "attention_mask", "label"}
        return training.collate(
            [{**{k: v for k, v in row.items() if k != "label"}, "labels": row["label"]} for row in rows]
        )

    for given in (None, full):
        maps.append(DataMapCallback(given, tmp_path / "map"))
        run(tiny.model("bert", seed=1), full, [maps[-1]], collate=collate)
    check_equal(maps[0].data_map, maps[1].data_map, exact=True)
    assert maps[0].data_map.fingerprint == maps[1].data_map.fingerprint
    maps[0].data_map.check_rows(full)


@pytest.mark.slow
def test_a_data_set_of_ones_own_needs_a_length_only():
    class Pairs(torch.utils.data.Dataset):
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, row):
            return self.rows[row]

    data, maps = training.rows(ROWS), []
    for rows in (data, Pairs(data)):
        maps.append(DataMapCallback())
        run(tiny.model("bert", seed=1), rows, [maps[-1]], train_sampling_strategy="sequential")
    check_equal(maps[0].data_map, maps[1].data_map)
    assert maps[1].data_map.fingerprint is None


def test_other_rows_than_the_trained_ones_can_be_mapped():
    other, callback, weights = training.rows(9, seed=3), None, KeepWeights()
    callback = DataMapCallback(other)
    network = tiny.model("bert", seed=1)
    run(network, training.rows(ROWS), [callback, weights])
    check_equal(callback.data_map, slow_map(network, weights.states, other))


@pytest.mark.parametrize("seed", [None, 3])
def test_random_masks_are_the_same_in_each_epoch_and_leave_training_alone(seed):
    """A masked language model; the collator draws from the global state, or from a generator of its own."""
    data = training.rows(ROWS, labels=None)
    ends, found = [], DataMapCallback(batch_size=4)
    for callbacks in ([], [found]):
        torch.manual_seed(2)
        collator = DataCollatorForLanguageModeling(tiny.tokenizer(), mlm_probability=0.5, seed=seed)
        network = tiny.model("bert", "fill-mask", seed=1)
        run(network, data, callbacks, collate=collator, num_train_epochs=2)
        ends.append(network.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    run(network, data, [found], collate=collator, learning_rate=0.0, num_train_epochs=2)
    known = ~np.isnan(found.data_map.confidence)  # a row may have drawn no mask
    assert known.sum() > ROWS / 2
    assert found.data_map.variability[known] == pytest.approx(0.0, abs=1e-6)


def test_a_causal_model_is_asked_for_the_next_token():
    """Row by row: the mean probability of the gold tokens, and the share that is predicted."""
    data, callback, weights = training.rows(6, "causal"), DataMapCallback(), KeepWeights()
    network = tiny.model("llama", seed=1)
    run(network, data, [callback, weights], num_train_epochs=1)
    network.load_state_dict(weights.states[0])
    network.eval()
    for row in range(len(data)):
        batch = next_token_labels({name: torch.tensor([data[row][name]]) for name in ("input_ids", "attention_mask")})
        ids = batch["input_ids"][0].tolist()
        p = tiny.logits(network, {"input_ids": batch["input_ids"]})[0].softmax(-1)
        gold = [float(p[position, token]) for position, token in enumerate(ids[1:])]
        right = [int(p[position].argmax()) == token for position, token in enumerate(ids[1:])]
        assert callback.data_map.confidence[row] == pytest.approx(np.mean(gold), abs=1e-5)
        assert callback.data_map.correctness[row] == pytest.approx(np.mean(right))


def planted(rows=200, share=0.1):
    """Sentences whose class is whether they hold "good" or "bad"; a share has the other label."""
    generator = np.random.default_rng(0)
    fillers = [word for word in tiny.WORDS if word not in ("good", "bad")]
    words = np.array(["bad", "good"])
    truth = generator.integers(2, size=rows)
    texts = [" ".join([*generator.choice(fillers, 5), words[label]]) for label in truth]
    wrong = generator.choice(rows, int(share * rows), replace=False)
    labels = truth.copy()
    labels[wrong] = 1 - labels[wrong]
    return tiny.tokenizer()(texts).data | {"labels": labels.tolist()}, set(wrong.tolist()), truth


@pytest.mark.slow
def test_planted_wrong_labels_rank_first():
    rows, wrong, truth = planted()
    callback = DataMapCallback()
    run(
        tiny.model("bert", seed=1, hidden_size=32, intermediate_size=64),
        Dataset.from_dict(rows),
        [callback],
        num_train_epochs=5,
        optim="adamw_torch",
        learning_rate=2e-3,
        per_device_train_batch_size=16,
    )
    errors = callback.data_map.label_errors(top=len(wrong))
    precision = len(wrong & {error.row for error in errors}) / len(wrong)
    assert precision >= 0.9
    found = callback.data_map.label_errors()
    assert len(wrong & {error.row for error in found}) / len(found) >= 0.9
    assert len(wrong & {error.row for error in found}) / len(wrong) >= 0.9
    assert all(error.predicted == truth[error.row] != error.given for error in errors if error.row in wrong)
    assert [error.aum for error in found] == sorted(error.aum for error in found)


@pytest.fixture
def small(tmp_path):
    """A map of four rows, of which the second was never right and the last has no label."""
    found = RunningMeasures(4)
    labels = torch.tensor([0, 1, 1, -100])
    for epoch, z in enumerate(([[2.0, 0], [2, 0], [0, 1], [0, 0]], [[3.0, 0], [5, 0], [1, 0], [0, 0]]), start=1):
        found.add(epoch, {name: value.numpy() for name, value in row_measures(torch.tensor(z), labels).items()})
    columns = {"input_ids": "0" * 32}
    return DataMap(**found.arrays(), epochs=(1, 2), columns=columns, label_names=("no", "yes"), seconds=1.5)


def test_the_folder_holds_the_map(tmp_path, small):
    small.save(tmp_path / "map")
    loaded = DataMap.load(tmp_path / "map")
    check_equal(loaded, small, exact=True)
    for name in ("epochs", "columns", "label_names", "model", "seconds", "fingerprint"):
        assert getattr(loaded, name) == getattr(small, name), name
    assert loaded.labels.tolist() == small.labels.tolist()
    assert loaded.predicted.tolist() == small.predicted.tolist()
    text = json.loads((tmp_path / "map" / "data_map.json").read_text())
    assert (text["rows"], text["epochs"], text["fingerprint"]) == (4, [1, 2], small.fingerprint)
    assert sorted(path.name for path in (tmp_path / "map").iterdir()) == ["data_map.json", "data_map.safetensors"]


def test_label_errors_by_count_and_by_threshold(small):
    assert small.aum.tolist() == pytest.approx([2.5, -3.5, 0.0, np.nan], nan_ok=True)
    assert [(error.row, error.given, error.predicted, error.aum) for error in small.label_errors()] == [
        (1, 1, 0, pytest.approx(-3.5))
    ]
    assert [error.row for error in small.label_errors(top=2)] == [1, 2]
    assert [error.row for error in small.label_errors(threshold=10.0)] == [1, 2, 0], "the row without label is none"
    assert [error.row for error in small.label_errors(top=1, threshold=10.0)] == [1]
    for top in (0, -1, True, 1.5):
        with pytest.raises(SettingError, match="top must be a whole number of at least 1"):
            small.label_errors(top=top)


def test_the_summary_counts(small):
    shown = str(small)
    assert "| rows                              | 4 " in shown
    assert "| never right                       | 1 " in shown
    assert "| AUM below 0 (likely label errors) | 1 " in shown


def test_the_plot_shows_confidence_against_variability(tmp_path, small, monkeypatch):
    kind, drawn = pytest.importorskip("matplotlib.axes", reason="needs the extra plots").Axes, {}
    scatter = kind.scatter

    def keep(self, x, y, c=None, **kwargs):
        drawn.update(x=x, y=y, c=c)
        return scatter(self, x, y, c=c, **kwargs)

    monkeypatch.setattr(kind, "scatter", keep)
    for suffix in (".png", ".svg"):
        small.plot(tmp_path / f"map{suffix}")
        assert (tmp_path / f"map{suffix}").stat().st_size > 1000
    for name, values in (("x", small.variability), ("y", small.confidence), ("c", small.correctness)):
        assert np.array_equal(drawn[name], values, equal_nan=True)
    monkeypatch.setattr("hfshrink.selection.datamap.PLOTTED_ROWS", 2)
    small.plot(tmp_path / "few.png")
    assert len(drawn["x"]) == 2
    with pytest.raises(SettingError, match=r"must end in \.png or \.svg"):
        small.plot(tmp_path / "map.pdf")


def test_a_map_knows_its_rows():
    data, callback = training.rows(8), DataMapCallback()
    run(tiny.model("bert", seed=1), data, [callback], num_train_epochs=1)
    found = callback.data_map
    found.check_rows(data)
    found.check_rows(data.add_column("source", ["a"] * 8).remove_columns("attention_mask"))
    with pytest.raises(SettingError, match="made of 8 rows, the data set has 7"):
        found.check_rows(data.select(range(7)))
    with pytest.raises(SettingError, match="the column 'input_ids' or the rows' order has changed"):
        found.check_rows(data.select(range(7, -1, -1)))
    labels = [1 - label for label in data["labels"]]
    with pytest.raises(SettingError, match="the column 'labels' or the rows' order has changed"):
        found.check_rows(data.remove_columns("labels").add_column("labels", labels))


def test_a_data_set_without_a_known_column_is_only_counted(caplog):
    callback = DataMapCallback()
    run(tiny.model("bert", seed=1), training.rows(8), [callback], num_train_epochs=1)
    with caplog.at_level(logging.WARNING):
        callback.data_map.check_rows(Dataset.from_dict({"text": ["a"] * 8}))
    assert "that its rows are the same was not checked" in caplog.text
    raw = training.rows(8).select_columns("labels").rename_column("labels", "label").add_column("text", ["a"] * 8)
    callback.data_map.check_rows(raw)
    with pytest.raises(SettingError, match="the classes in 'label' are not those that it saw"):
        callback.data_map.check_rows(raw.select(range(1, 8)).add_item(raw[0]))


def test_token_tasks_have_no_label_errors():
    callback = DataMapCallback()
    run(tiny.model("bert", "token-classification", seed=1), training.rows(8, "tokens"), [callback], num_train_epochs=1)
    with pytest.raises(SettingError, match=r"no single label that could be wrong.*np.argsort\(data_map.aum\)"):
        callback.data_map.label_errors()
    assert "likely label errors" not in str(callback.data_map)


@pytest.mark.parametrize(
    ("labels", "config", "error", "message"),
    [
        ("regression", {"num_labels": 1}, SettingError, "needs one class per row or token, got labels of .*float32"),
        ("multi", {"problem_type": "multi_label_classification"}, SettingError, "several labels per row"),
        (None, {}, SettingError, "needs labels: expected one of labels, label, label_ids"),
    ],
)
def test_rows_without_classes_are_refused_before_training(labels, config, error, message):
    network = tiny.model("bert", seed=1, **config)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(error, match=message):
        run(network, training.rows(8, labels), [DataMapCallback()])
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_a_model_without_classes_is_refused():
    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, input_ids, labels=None):
            return {"loss": self.layer(input_ids.float().mean()[None]).sum()}

    with pytest.raises(UnsupportedModelError, match=r"Expected logits of shape \(2, 'classes'\).*got None"):
        run(Pooled(), training.rows(8), [DataMapCallback()])


def test_streaming_and_empty_data_sets_are_refused():
    stream, network = training.rows(8).to_iterable_dataset(), tiny.model("bert", seed=1)
    with pytest.raises(SettingError, match=r"got a streaming data set .*Dataset.from_list"):
        run(network, stream, [DataMapCallback()], max_steps=2)
    with pytest.raises(SettingError, match="is empty"):
        run(network, training.rows(8), [DataMapCallback(training.rows(8).select([]))])
    rows = DataMapCallback(training.rows(8))
    run(network, stream, [rows], max_steps=2, num_train_epochs=1)
    assert rows.data_map is None or len(rows.data_map) == 8


def test_a_diverged_model_is_named_with_its_row():
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.classifier.bias.data.fill_(torch.nan)

    with pytest.raises(SettingError, match=r"logits for row \d+ are NaN or infinite. Training has diverged"):
        run(tiny.model("bert", seed=1), training.rows(8), [Break(), DataMapCallback()], num_train_epochs=1)


@pytest.mark.parametrize(("name", "value"), [("every", 0), ("every", 1.5), ("batch_size", 0), ("batch_size", True)])
def test_numbers_must_be_whole_and_positive(name, value):
    with pytest.raises(SettingError, match=f"{name} must be a whole number of at least 1, got {value}"):
        DataMapCallback(**{name: value})


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "map").write_text("")
    with pytest.raises(CheckpointError, match="is a file; output_dir must be a folder"):
        run(tiny.model("bert", seed=1), training.rows(8), [DataMapCallback(output_dir=tmp_path / "map")])


def test_corrupt_maps_are_refused(tmp_path, small):
    from safetensors.numpy import save_file

    with pytest.raises(CheckpointError, match="Can't read"):
        DataMap.load(tmp_path)
    path = tmp_path / "data_map.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="Can't read"):
        DataMap.load(tmp_path)
    save_file({"confidence": np.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="no data map of format 1"):
        DataMap.load(tmp_path)
    save_file({"confidence": np.zeros(2)}, path, metadata={"hfshrink": '{"format_version": 1}'})
    with pytest.raises(CheckpointError, match="is corrupt: it holds confidence"):
        DataMap.load(tmp_path)
    save_file({"confidence": np.zeros(2)}, path, metadata={"hfshrink": "{"})
    with pytest.raises(CheckpointError, match="Can't read"):
        DataMap.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["class", "causal"])
def test_two_processes_make_the_map_of_one(tmp_path, labels):
    """Uneven shares of rows; the two stop after two epochs, lose the second's file, and go on to the third."""
    maps = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        training.launch(Path(__file__).with_name("ddp_run.py"), processes, folder, 4 // processes, labels)
        maps.append(DataMap.load(folder / "data_map"))
    assert maps[0].epochs == maps[1].epochs == (1, 2, 3)
    assert maps[0].fingerprint == maps[1].fingerprint
    assert maps[0].variability.max() > 1e-3, "something must have been learned"
    check_equal(*maps)
