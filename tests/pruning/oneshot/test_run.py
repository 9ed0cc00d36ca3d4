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
from hfshrink.evaluation.profiling import count_macs
from hfshrink.pruning.units.groups import find_units, used_units
from hfshrink.pruning.units.weights import prunable

ENCODERS = ("bert", "roberta", "electra", "distilbert", "vit")
FAMILIES = (*ENCODERS, "llama", "gpt2")
WEIGHT_METHODS = ("magnitude", "random", "taylor", "fisher", "sparsegpt")
LAYERS = (("top", [1]), ("influence", None), ("random", None))


def batches(family, count=3):
    found = [dict(tiny.inputs(family, seed=seed)) for seed in range(count)]
    if tiny.TASK[family] != "text-generation":
        for batch in found:
            batch["labels"] = torch.tensor([0, 1, 1])
    return found


def same(one, other, family, tolerance=1e-5):
    batch = tiny.inputs(family)
    return torch.allclose(tiny.logits(one.eval(), batch), tiny.logits(other.eval(), batch), atol=tolerance)


def unchanged(model, before):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    ("family", "method"), [*((f, "wanda") for f in FAMILIES), *(("bert", m) for m in WEIGHT_METHODS)]
)
def test_half_of_the_weights_go(family, method):
    model = tiny.model(family)
    prune(model, 0.5, method=method, calibration=batches(family))
    weights = [module.weight for module in prunable(model).values()]
    share = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert share == pytest.approx(0.5, abs=0.02)
    assert report(model).steps[-1].method == method
    assert torch.isfinite(tiny.logits(model, tiny.inputs(family))).all()


@pytest.mark.parametrize(
    ("family", "structure", "method"),
    [
        *((family, "heads+neurons", "search") for family in FAMILIES),
        *(("bert", structure, "search") for structure in ("heads", "neurons")),
        *(("bert", "heads+neurons", method) for method in ("magnitude", "random", "activation", "taylor", "fisher")),
        ("llama", "heads", "magnitude"),
        ("gpt2", "heads", "magnitude"),
    ],
)
def test_cut_units_compute_what_masked_units_do(family, structure, method):
    masked, cut = tiny.model(family), tiny.model(family)
    prune(masked, 0.4, structure, method, calibration=batches(family), cut=False)
    prune(cut, 0.4, structure, method, calibration=batches(family))
    assert same(masked, cut, family)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in masked.parameters())
    inputs = tiny.inputs(family)
    assert count_macs(cut, inputs) < count_macs(masked, inputs)


@pytest.mark.parametrize(
    ("family", "scope"), [*((f, "global") for f in FAMILIES), ("bert", "module"), ("llama", "module")]
)
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
@pytest.mark.parametrize("structure", ["heads+neurons", "layers"])
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


@pytest.mark.parametrize(
    ("family", "structure", "method"),
    [
        ("gpt2", "unstructured", "magnitude"),
        ("bert", "unstructured", "sparsegpt"),
        ("llama", "heads+neurons", "search"),
        ("bert", "layers", "spread"),
    ],
)
def test_a_sparsity_of_zero_changes_nothing_and_says_so(family, structure, method, caplog):
    model, before = tiny.model(family), tiny.model(family)
    prune(model, 0.0, structure, method, calibration=batches(family))
    assert unchanged(model, before)
    assert report(model).steps[-1].modules == []
    assert "neither the file" not in caplog.text


@pytest.mark.parametrize(
    ("pattern", "method"),
    [("2:4", "magnitude"), ("1:4", "magnitude"), ("4:8", "magnitude"), ("2:4", "wanda"), ("2:4", "sparsegpt")],
)
def test_every_group_of_neighbours_keeps_its_number(pattern, method):
    model = tiny.model("bert")
    prune(model, structure=pattern, method=method, calibration=batches("bert"))
    n, m = map(int, pattern.split(":"))
    for module in prunable(model).values():
        assert ((module.weight != 0).unflatten(1, (-1, m)).sum(-1) <= n).all()


@pytest.mark.parametrize(
    ("family", "method", "dropped"),
    [*((family, "spread", [1]) for family in FAMILIES), *(("bert", m, d) for m, d in LAYERS)],
)
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


def test_language_models_need_no_labels_and_an_iterator_will_do():
    model = prune(tiny.model("llama"), 0.5, "heads+neurons", calibration=iter(batches("llama")))
    step = report(model).steps[-1]
    assert (step.method, step.source) == ("search", "Kwon et al. 2022, arXiv:2204.09656")


def test_without_labels_units_go_by_their_activations_equally_many_in_each_layer():
    model = prune(tiny.model("bert"), 0.5, "heads+neurons", calibration=[tiny.inputs("bert")])
    step = report(model).steps[-1]
    assert (step.method, step.source) == ("activation", "Muralidharan et al. 2024, arXiv:2407.14679")
    assert {(name.split(".")[-1], *kept) for name, kept in step.results["kept"].items()} == {
        ("heads", 2, 4),
        ("neurons", 12, 24),
    }


def test_the_record_names_the_paper_of_the_structure():
    assert report(prune(tiny.model("bert"), 0.5)).steps[-1].source.startswith("Zhu and Gupta")
    assert report(prune(tiny.model("resnet"), 0.5, "channels")).steps[-1].source.startswith("Li et al.")
    assert report(prune(tiny.model("bert"), 0.5, "heads")).steps[-1].source == ""


def test_masks_name_only_the_modules_that_lost_something():
    model = prune(tiny.model("bert"), 0.15, "heads", cut=False)  # one of eight
    [name] = report(model).steps[-1].modules
    assert name.endswith("attention.output.dense")


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


def test_two_cuts_follow_each_other():
    model = prune(tiny.model("bert"), 0.5, "heads")
    prune(model, 0.5, "neurons")
    prune(model, 0.5, "heads")
    assert [used_units(model, group).numel() for group in find_units(model, "heads")] != [4, 4]
    assert len(report(model).steps) == 3


def test_a_layer_with_one_head_left_does_not_spare_the_others():
    model = prune(tiny.model("bert"), 0.7, "heads", include="*.0.*", scope="module")
    prune(model, 0.4, "heads")
    assert [group.units for group in find_units(model, "heads")] == [1, 2]
