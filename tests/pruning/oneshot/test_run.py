"""`prune` in one call: every structure and method on every family, reload, generate, record, and bad input."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
from hfshrink import prune, report
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.evaluation.profiling import count_macs
from hfshrink.pruning.units.groups import find_units, used_units
from hfshrink.pruning.units.weights import prunable

ENCODERS = ("bert", "roberta", "electra", "distilbert", "vit")
FAMILIES = (*ENCODERS, "llama", "gpt2")


def batches(family, count=3):
    found = [dict(tiny.inputs(family, seed=seed)) for seed in range(count)]
    if tiny.TASK[family] != "text-generation":
        for batch in found:
            batch["labels"] = torch.tensor([0, 1, 1])
    return found


def same(one, other, family, tolerance=1e-5):
    batch = tiny.inputs(family)
    return torch.allclose(tiny.logits(one.eval(), batch), tiny.logits(other.eval(), batch), atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["magnitude", "random", "taylor", "fisher", "wanda", "sparsegpt"])
def test_half_of_the_weights_go(family, method):
    model = tiny.model(family)
    prune(model, 0.5, method=method, calibration=batches(family))
    weights = [module.weight for module in prunable(model).values()]
    share = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert share == pytest.approx(0.5, abs=0.02)
    assert report(model).steps[-1].method == method
    assert torch.isfinite(tiny.logits(model, tiny.inputs(family))).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("structure", ["heads", "neurons", "heads+neurons"])
@pytest.mark.parametrize("method", ["magnitude", "activation", "taylor", "search"])
def test_cut_units_compute_what_masked_units_do(family, structure, method):
    masked, cut = tiny.model(family), tiny.model(family)
    prune(masked, 0.4, structure, method, calibration=batches(family), cut=False)
    prune(cut, 0.4, structure, method, calibration=batches(family))
    assert same(masked, cut, family)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in masked.parameters())
    inputs = tiny.inputs(family)
    assert count_macs(cut, inputs) < count_macs(masked, inputs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["global", "module"])
def test_what_was_cut_comes_back_from_its_folder(family, scope, tmp_path):
    model = prune(tiny.model(family), 0.5, "heads+neurons", scope=scope)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(again.eval(), tiny.inputs(family)), tiny.logits(model.eval(), tiny.inputs(family)))
    assert report(tmp_path).steps[-1].technique == "prune"


def test_equal_neurons_need_no_package_of_ours(tmp_path):
    model = prune(tiny.model("bert"), 0.5, "neurons", scope="module")
    assert model.config.intermediate_size == 12
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("structure", ["heads", "neurons", "heads+neurons", "layers"])
def test_cut_language_models_generate_as_without_a_cache(family, structure, tmp_path):
    model = prune(tiny.model(family), 0.5, structure)
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([[5, 6, 7]])
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
    assert cached.shape == (1, 9)
    static = model.generate(prompt, attention_mask=torch.ones_like(prompt), cache_implementation="static", **how)
    ids = prompt
    for _ in range(6):  # the slow way: everything anew for each token
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert cached.tolist() == ids.tolist() == static.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("structure", ["unstructured", "heads+neurons"])
def test_a_sparsity_of_zero_changes_nothing(family, structure):
    model, before = tiny.model(family), tiny.model(family)
    prune(model, 0.0, structure)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_group_of_neighbours_keeps_its_number(pattern, method):
    model = tiny.model("bert")
    prune(model, structure=pattern, method=method, calibration=batches("bert"))
    n, m = map(int, pattern.split(":"))
    for module in prunable(model).values():
        assert ((module.weight != 0).unflatten(1, (-1, m)).sum(-1) <= n).all()


@pytest.mark.parametrize(("method", "dropped"), [("top", [1]), ("spread", [1]), ("influence", None), ("random", None)])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_layers_go(family, method, dropped, tmp_path):
    model = prune(tiny.model(family), 0.5, "layers", method, calibration=batches(family))
    step = report(model).steps[-1]
    assert model.config.num_hidden_layers == 1
    assert dropped is None or step.results["dropped_layers"] == dropped
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(again.eval(), tiny.inputs(family)), tiny.logits(model.eval(), tiny.inputs(family)))


def test_units_that_do_not_matter_go_first():
    """Two neurons of each layer are read by nobody: methods that look at the data or the reads find them."""
    for method in ("activation", "taylor", "fisher", "search"):
        model = tiny.model("bert")
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight.data[:12] = 0  # they say gelu(−20) = 0 whatever they read
            layer.intermediate.dense.bias.data[:12] = -20
        before = copy.deepcopy(model)
        prune(model, 0.5, "neurons", method, calibration=batches("bert"))
        assert same(model, before, "bert"), method


def test_masks_alone_are_said_to_gain_nothing(caplog):
    model = tiny.model("bert")
    with caplog.at_level(logging.WARNING):
        prune(model, 0.5)
    assert "neither the file nor the latency" in caplog.text
    assert "prune: Zeros in dense tensors: neither the file" in str(report(model))
    caplog.clear()
    cut = prune(tiny.model("bert"), 0.5, "neurons")
    assert "note" not in report(cut).steps[-1].results
    assert not caplog.text


def test_the_record_holds_what_was_asked_and_what_came():
    model = tiny.model("bert")
    before = sum(p.numel() for p in model.parameters())
    prune(model, 0.5, "heads", "taylor", calibration=batches("bert"), exclude="*.1.*")
    step = report(model).steps[-1]
    assert step.settings == {
        "sparsity": 0.5,
        "structure": "heads",
        "method": "taylor",
        "exclude": "*.1.*",
        "calibration": "list",
    }
    assert step.before.parameters == before
    assert step.after.parameters == sum(p.numel() for p in model.parameters())
    assert step.results["kept"] == {"bert.encoder.layer.0.heads": [2, 4]}


def test_a_raw_data_set_serves_as_calibration(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    rows = Dataset.from_dict({"text": ["good film", "bad plot", "the old story is dull"], "label": [1, 0, 0]})
    model = prune(str(tmp_path), 0.5, "heads+neurons", calibration=rows)
    assert isinstance(model, type(AutoModelForSequenceClassification.from_pretrained(tmp_path)))
    assert report(model).steps[-1].method == "search"


def test_language_models_need_no_labels():
    model = prune(tiny.model("llama"), 0.5, "heads+neurons", calibration=batches("llama"))
    assert report(model).steps[-1].method == "search"


def test_a_latency_budget_is_met_by_the_prediction():
    model = tiny.model("bert", hidden_size=128, intermediate_size=512)
    prune(model, 0.3, "heads+neurons", "search", calibration=batches("bert"), cost="latency")
    results = report(model).steps[-1].results
    assert results["latency_ms_after"] <= 0.7 * results["latency_ms_before"] * 1.001


def test_channels_are_cut(tmp_path):
    family = "resnet"
    masked, cut = tiny.model(family), tiny.model(family)
    prune(masked, 0.5, "channels", cut=False)
    prune(cut, 0.5, "channels")
    assert same(masked, cut, family, 1e-4)
    assert sum(p.numel() for p in cut.parameters()) < 0.8 * sum(p.numel() for p in masked.parameters())
    cut.save_pretrained(tmp_path)
    again = type(cut).from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(again.eval(), tiny.inputs(family)), tiny.logits(cut.eval(), tiny.inputs(family)))


def test_a_plain_net_is_cut_too():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 5),
    ).eval()
    images = torch.randn(2, 3, 8, 8)
    masked = prune(copy.deepcopy(net), 0.5, "channels", calibration=images, cut=False)
    cut = prune(net, 0.5, "channels", calibration=images)
    assert torch.allclose(masked(images), cut(images), atol=1e-5)
    assert [module.weight.shape[0] for module in cut if hasattr(module, "weight")] == [4, 4, 6, 5]


def test_a_plain_net_needs_a_batch():
    with pytest.raises(SettingError, match="Sequential is no model of transformers.*calibration="):
        prune(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), 0.5, "channels")


BAD = [
    ({"sparsity": 1.0}, r"number in \[0, 1\), got 1.0"),
    ({"sparsity": 50}, r"got 50. For 50 percent give 0.5"),
    ({"sparsity": None}, r"number in \[0, 1\), got None"),
    ({"sparsity": True}, "got True"),
    ({"sparsity": 0.5, "structure": "blocks"}, "structure must be one of unstructured, heads"),
    ({"sparsity": 0.5, "structure": "vocabulary"}, "trim_vocabulary"),
    ({"sparsity": 0.7, "structure": "2:4"}, "2:4 means a sparsity of 0.5"),
    ({"structure": "4:2"}, "1 ≤ n < m, got '4:2'"),
    ({"structure": "3:7"}, "needs a number of inputs that 7 divides"),
    ({"sparsity": 0.5, "method": "movement"}, "method must be one of magnitude, random.* for weights"),
    ({"sparsity": 0.5, "method": "wanda"}, "'wanda' needs data: give calibration="),
    ({"sparsity": 0.5, "structure": "heads", "method": "search"}, "'search' needs data"),
    ({"sparsity": 0.5, "cost": "latency"}, "cost must be macs"),
    ({"sparsity": 0.5, "scope": "layer"}, "scope must be one of global, module, row"),
    ({"sparsity": 0.5, "cut": False}, "cut=False leaves units as zeros"),
    ({"sparsity": 0.9, "structure": "heads", "scope": "module"}, "empty"),
    ({"sparsity": 0.2, "structure": "layers"}, "is none. Give 0.500 or more"),
    ({"sparsity": 0.5, "include": "*.nothing"}, "matches none"),
    ({"sparsity": 0.5, "structure": "heads", "include": "*.nothing"}, "matches none of 2 groups"),
]


@pytest.mark.parametrize(("keywords", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_keywords_change_nothing(keywords, message):
    model, before = tiny.model("bert"), tiny.model("bert")
    with pytest.raises(SettingError, match=message):
        prune(model, **keywords)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert report(model).steps == ()


def test_other_families_are_named_with_what_works():
    with pytest.raises(UnsupportedModelError, match="'resnet'.*unstructured"):
        prune(tiny.model("resnet"), 0.5, "heads")
    with pytest.raises(UnsupportedModelError, match="'bert'.*heads"):
        prune(tiny.model("bert"), 0.5, "channels")


def test_data_without_labels_is_named():
    rows = [tiny.inputs("bert")]
    with pytest.raises(SettingError, match="labels"):
        prune(tiny.model("bert"), 0.5, "heads", "search", calibration=rows)


def test_broken_weights_are_named():
    model = tiny.model("bert")
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    for structure in ("unstructured", "neurons"):
        with pytest.raises(SettingError, match="layer.1.output.dense.weight has NaN"):
            prune(model, 0.5, structure)


def test_two_cuts_follow_each_other():
    model = prune(tiny.model("bert"), 0.5, "heads")
    prune(model, 0.5, "neurons")
    prune(model, 0.5, "heads")
    assert [used_units(model, group).numel() for group in find_units(model, "heads")] != [4, 4]
    assert len(report(model).steps) == 3
