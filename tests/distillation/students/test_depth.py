"""Which layers stay, and what they are called then."""

import pytest
import torch

import tiny
from hfshrink import make_student, report
from hfshrink.distillation.students.depth import kept_layers, renumbered, smaller_config


def test_kept_layers_by_hand():
    assert kept_layers(12, 6, "spread") == [0, 2, 4, 7, 9, 11]
    assert kept_layers(5, 2, "first") == [0, 1]
    assert kept_layers(5, 2, "last") == [3, 4]
    assert kept_layers(5, 3, "influence", [0.5, 0.1, 0.9, 0.2, 0.3]) == [0, 2, 4]
    assert kept_layers(3, 2, "influence", [0.1, 0.1, 0.1]) == [0, 1]


@pytest.mark.parametrize("keep", ["spread", "first", "last", "influence"])
def test_keeping_all_layers_is_the_teacher(keep):
    assert kept_layers(4, 4, keep, [0.4, 0.3, 0.2, 0.1]) == [0, 1, 2, 3]


@pytest.mark.parametrize(("keep", "same"), [("first", [0, 1]), ("last", [2, 3])])
def test_keep_names_the_layers(keep, same):
    teacher = tiny.model("bert", num_hidden_layers=4)
    student, named = make_student(teacher, 2, keep=keep), make_student(teacher, layers=same)
    assert all(torch.equal(a, named.state_dict()[name]) for name, a in student.state_dict().items())
    step = report(student).steps[0]
    assert step.results["kept_layers"] == same
    assert step.results["copied_parameters"] == step.after.parameters
    assert step.settings == {"num_layers": 2, "layers": None, "keep": keep}


def test_names_inside_the_stack_are_renumbered():
    state = {"layer.0.w": 0, "layer.10.w": 10, "layer.2.w": 2, "head.w": 5}
    assert renumbered(state, "layer", [0, 10]) == {"layer.0.w": 0, "layer.1.w": 10, "head.w": 5}


def test_config_is_a_copy():
    config = tiny.model("llama", num_hidden_layers=4).config
    config.layer_types = ["full_attention"] * 3 + ["sliding_attention"]
    smaller = smaller_config(config, [0, 3], None)
    assert smaller.layer_types == ["full_attention", "sliding_attention"]
    assert (config.num_hidden_layers, smaller.num_hidden_layers) == (4, 2)
    assert len(config.layer_types) == 4
