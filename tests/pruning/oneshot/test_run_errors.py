"""`prune` on bad keywords, data, weights and families: it says what is wrong, and the model is as it was."""

import pytest
import torch
from torch import nn

import tiny
from hfshrink import prune, report
from hfshrink.errors import SettingError, UnsupportedModelError


def batches(family, count=3):
    found = [dict(tiny.inputs(family, seed=seed)) for seed in range(count)]
    if tiny.TASK[family] != "text-generation":
        for batch in found:
            batch["labels"] = torch.tensor([0, 1, 1])
    return found


def unchanged(model, before):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


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
    ({"sparsity": 0.5, "structure": "heads", "exclude": "*"}, "leave none of 2 groups"),
    ({"sparsity": 0.05, "structure": "heads"}, "0.05 of 2 groups with 4 units is none of them"),
    ({"sparsity": 0.9, "structure": "layers"}, "is all of them; one at least must stay"),
    ({"sparsity": 0.5, "structure": "layers", "include": "*.0.*"}, "which layers go is up to the method"),
    ({"sparsity": 0.5, "structure": "layers", "scope": "global"}, "scope must be left out for 'layers'"),
    ({"structure": "2:4", "scope": "row"}, "scope must be left out for '2:4'"),
]


@pytest.mark.parametrize(("keywords", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_keywords_change_nothing(keywords, message):
    model, before = tiny.model("bert"), tiny.model("bert")
    with pytest.raises(SettingError, match=message):
        prune(model, **keywords)
    assert unchanged(model, before)
    assert report(model).steps == ()


@pytest.mark.parametrize(
    ("structure", "method"),
    [
        *(("heads+neurons", method) for method in ("search", "activation", "taylor", "fisher")),
        *(("unstructured", method) for method in ("wanda", "sparsegpt", "taylor", "fisher")),
        ("layers", "influence"),
    ],
)
def test_broken_data_change_nothing(structure, method):
    model, before = tiny.model("vit").train(), tiny.model("vit")
    rows = batches("vit")
    rows[-1]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(SettingError, match="NaN"):
        prune(model, 0.5, structure, method, calibration=rows)
    assert unchanged(model, before)
    assert report(model).steps == ()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_search_whose_cut_is_refused_changes_nothing():
    model, before = tiny.model("bert"), tiny.model("bert")
    for network in (model, before):
        first, second = (layer.output.dense for layer in network.bert.encoder.layer)
        second.weight = first.weight
    with pytest.raises(SettingError, match="tied to another one"):
        prune(model, 0.5, "neurons", "search", calibration=batches("bert"))
    assert unchanged(model, before)


def test_heads_of_the_task_stay_whichever_way_everything_is_included():
    model = tiny.model("bert")
    prune(model, 0.5, include=["*"])
    assert bool((model.classifier.weight != 0).all())


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
    for structure, method in (("unstructured", None), ("neurons", None), ("layers", "top"), ("layers", "random")):
        with pytest.raises(SettingError, match="layer.1.output.dense.weight has NaN"):
            prune(model, 0.5, structure, method)


def test_an_export_is_refused():
    export = type("ExportedModel", (), {"config": tiny.model("bert").config})()
    with pytest.raises(UnsupportedModelError, match="ExportedModel can't be pruned"):
        prune(export, 0.5)
