"""Targets: the largest rung that fits, by brute force."""

import pytest
import torch

import tiny
from hfshrink import make_student, report
from hfshrink.distillation.students import targets
from hfshrink.distillation.students.targets import Rung, ladder
from hfshrink.distillation.students.width import Widths, widths_of
from hfshrink.errors import SettingError
from hfshrink.evaluation.profiling import weight_bytes


def teacher(family="bert", **config):
    depth = {"distilbert": "n_layers", "gpt2": "n_layer"}.get(family, "num_hidden_layers")
    return tiny.model(family, **{depth: 4}, **config)


def rungs_of(model):
    """Every student of the ladder, cut one by one, from the largest."""
    found = []
    for rung in ladder(4, widths_of(model)):
        sizes = rung.to_dict()
        found.append(make_student(model, sizes.pop("num_layers"), **sizes))
    return found


def parameters(model):
    return sum(weight.numel() for weight in model.parameters())


def test_ladder_goes_to_half_the_depth_then_to_one_head_then_to_one_layer():
    rungs = ladder(5, Widths(12, 25, 6, 3))
    assert [r.num_layers for r in rungs] == [5, 4, 3, 3, 3, 2, 1]
    assert [r.widths for r in rungs[:3]] == [None, None, None]
    assert rungs[3] == Rung(3, Widths(8, 16, 4, 2))
    assert [r.widths for r in rungs[4:]] == [Widths(4, 8, 2, 1)] * 3
    assert [r.num_layers for r in ladder(1, Widths(4, 8, 1, 1))] == [1]


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "vit"])
def test_every_rung_is_smaller_and_the_largest_that_fits_is_taken(family):
    model = teacher(family)
    sizes = [parameters(student) for student in rungs_of(model)]
    assert sizes == sorted(set(sizes), reverse=True)
    for limit in (sizes[0], sizes[2], sizes[2] - 1, sizes[-1]):
        student = make_student(model, max_parameters=limit)
        assert parameters(student) == max(size for size in sizes if size <= limit)
        step = report(student).steps[0]
        assert step.results["target"] == {"max_parameters": limit}
        assert step.results["reached"] == {"parameters": parameters(student)}
        assert step.settings["max_parameters"] == limit


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_file_follow_from_the_shapes(family, dtype, tmp_path):
    model = teacher(family).to(dtype)
    model.save_pretrained(tmp_path)
    assert targets.file_bytes(model) == weight_bytes(tmp_path)
    with torch.device("meta"):
        sketch = type(model)._from_config(model.config, dtype=dtype)
    assert targets.file_bytes(sketch) == weight_bytes(tmp_path)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_largest_file_under_the_limit(family, tmp_path):
    """ViT's weights have longer names on disk than in memory: the files decide, not the estimate."""
    model, sizes = teacher(family), []
    for number, student in enumerate(rungs_of(model)):
        student.save_pretrained(tmp_path / str(number))
        sizes.append(weight_bytes(tmp_path / str(number)))
    for limit in (sizes[1], sizes[1] - 1, sizes[4]):
        student = make_student(model, max_size_bytes=limit)
        student.save_pretrained(tmp_path / f"under-{limit}")
        size = weight_bytes(tmp_path / f"under-{limit}")
        assert size == max(other for other in sizes if other <= limit)
        step = report(student).steps[0]
        assert step.results["reached"] == {"size_bytes": size}
        assert step.after.size_bytes == size


@pytest.fixture
def slow_by_layer(monkeypatch):
    """A clock that takes 10 ms a layer and 1 ms a channel."""
    from hfshrink.measurement import Latency

    def fake(models, **settings):
        [(name, model)] = models.items()
        cost = 10.0 * model.config.num_hidden_layers + model.config.hidden_size
        rest = {"cpu_ms": cost, "runtime": "torch", "device": "cpu", "threads": 1, "batch_size": 1, "repeats": 1}
        return {name: (Latency(cost, cost, sequence_length=settings["sequence_length"], **rest),)}

    monkeypatch.setattr(targets, "measure_latencies", fake)


@pytest.mark.parametrize(("limit", "sizes"), [(56, (4, 16)), (55, (3, 16)), (35, (2, 12)), (14, (1, 4))])
def test_latency_is_searched_on_built_students(slow_by_layer, limit, sizes):
    student = make_student(teacher(), max_latency_ms=limit)
    assert (student.config.num_hidden_layers, student.config.hidden_size) == sizes
    step = report(student).steps[0]
    assert step.results["reached"] == {"latency_ms_p50": 10.0 * sizes[0] + sizes[1]}
    assert step.after.latency[0].sequence_length == 34


def test_latency_of_images_is_in_the_record():
    step = report(make_student(teacher("vit"), max_latency_ms=60_000)).steps[0]
    assert step.after.latency[0].sequence_length is None
    assert step.after.latency[0].repeats > 0
    assert step.results["reached"]["latency_ms_p50"] > 0


def test_electra_leaves_out_the_width_of_its_embeddings():
    """At hidden_size = embedding_size there is no projection between them."""
    model = teacher("electra")
    assert model.config.embedding_size == 8
    sizes = []
    for limit in (parameters(model) * part // 10 for part in range(9, 4, -1)):
        student = make_student(model, max_parameters=limit)
        assert parameters(student) <= limit
        sizes.append(student.config.hidden_size)
    assert 8 not in sizes
    assert make_student(model, max_parameters=3000).config.hidden_size == 4


def test_family_whose_widths_cannot_be_sliced_loses_layers_to_the_last():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    model = Olmo2ForCausalLM(Olmo2Config(**{**tiny.CONFIGS["llama"], "num_hidden_layers": 4}))
    one = parameters(make_student(model, num_layers=1))
    student = make_student(model, max_parameters=one)
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (1, 16)


def test_model_with_a_tensor_that_is_never_on_meta():
    from transformers import XLNetConfig, XLNetForSequenceClassification

    model = XLNetForSequenceClassification(XLNetConfig(vocab_size=44, d_model=16, n_layer=4, n_head=4, d_inner=24))
    half = parameters(make_student(model, num_layers=2))
    assert make_student(model, max_parameters=half).config.num_hidden_layers == 2


def test_latency_out_of_reach(slow_by_layer):
    with pytest.raises(SettingError, match=r"fits max_latency_ms=13\.9\. The smallest .* latency_ms_p50 14\.0\."):
        make_student(teacher(), max_latency_ms=13.9, max_parameters=10**6)


def test_student_that_turns_out_too_slow_gives_way_to_the_next(slow_by_layer, monkeypatch):
    true, seen = targets.measure, []

    def noisy(model, limits):
        seen.append(model)
        found = true(model, limits)
        slow = model.config.num_hidden_layers == 3 and model.config.hidden_size == 16 and seen.count(model) == 1
        return true(teacher(), limits) if slow and len(seen) > 3 else found

    monkeypatch.setattr(targets, "measure", noisy)
    student = make_student(teacher(), max_latency_ms=47)
    assert student.config.num_hidden_layers == 2
    assert student.config.hidden_size == 16


def test_real_clock():
    student = make_student(teacher(), max_latency_ms=60_000)
    assert student.config.num_hidden_layers == 4
    assert report(student).steps[0].after.latency[0].latency_ms_p50 > 0
    with pytest.raises(SettingError, match=r"fits max_latency_ms=1e-06\. .*latency_ms_p50 \d"):
        make_student(teacher(), max_latency_ms=1e-6)


def test_several_targets_hold_together(slow_by_layer):
    model = teacher()
    sizes = [parameters(student) for student in rungs_of(model)]
    student = make_student(model, max_parameters=sizes[1], max_latency_ms=36)
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (2, 16)
    student = make_student(model, max_parameters=sizes[4], max_latency_ms=36)
    assert parameters(student) == sizes[4]
    assert set(report(student).steps[0].results["reached"]) == {"parameters", "latency_ms_p50"}


def test_family_with_unknown_widths_loses_layers_only():
    from transformers import SqueezeBertConfig, SqueezeBertForSequenceClassification

    groups = dict.fromkeys(("q_groups", "k_groups", "v_groups", "intermediate_groups", "output_groups"), 1)
    model = SqueezeBertForSequenceClassification(SqueezeBertConfig(**tiny.ENCODER, embedding_size=16, **groups))
    student = make_student(model, max_parameters=parameters(model) - 1)
    assert student.config.num_hidden_layers == 1


def test_target_out_of_reach_says_the_smallest():
    model = teacher()
    smallest = parameters(rungs_of(model)[-1])
    with pytest.raises(
        SettingError,
        match=rf"fits max_parameters=10\. The smallest \(num_layers=1, hidden_size=4,.* has parameters {smallest:,}\.",
    ):
        make_student(model, max_parameters=10)
    with pytest.raises(SettingError, match=r"fits max_size_bytes=10\. .* has size_bytes \d"):
        make_student(model, max_size_bytes=10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_parameters": 0}, "max_parameters must be a positive whole number, got 0"),
        ({"max_parameters": 1e6}, "max_parameters must be a positive whole number"),
        ({"max_size_bytes": True}, "max_size_bytes must be a positive whole number, got True"),
        ({"max_latency_ms": -1}, "max_latency_ms must be a positive number, got -1"),
        ({"max_latency_ms": float("nan")}, "max_latency_ms must be a positive number, got nan"),
    ],
)
def test_bad_targets(given, message):
    with pytest.raises(SettingError, match=message):
        make_student(teacher(), **given)
