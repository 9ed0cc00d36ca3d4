"""Students: the kept layers are the teacher's, and they reload with plain transformers."""

import subprocess
import sys

import pytest
import torch

import tiny
from hfshrink import make_student, report
from hfshrink.distillation.students.depth import spread_layers
from hfshrink.errors import SettingError, UnsupportedModelError

FAMILIES = ("bert", "roberta", "distilbert", "electra", "llama", "gpt2", "vit")


def deep(family, layers=4):
    return (
        tiny.model(family, num_hidden_layers=layers)
        if family not in ("distilbert", "gpt2")
        else tiny.model(family, **{{"distilbert": "n_layers", "gpt2": "n_layer"}[family]: layers})
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_change_nothing(family):
    teacher = deep(family)
    batch = tiny.inputs(family)
    assert torch.equal(tiny.logits(make_student(teacher, num_layers=4), batch), tiny.logits(teacher, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_student_equals_the_teacher_without_its_other_layers(family):
    from hfshrink.modules import layer_stack

    teacher, batch = deep(family), tiny.inputs(family)
    student = make_student(teacher, layers=[0, 3])
    _, stack = layer_stack(teacher)
    for layer in (2, 1):
        del stack[layer]
    teacher.config.num_hidden_layers = 2
    if family in ("llama", "gpt2"):
        teacher.config.use_cache = False
    assert torch.equal(tiny.logits(student, batch), tiny.logits(teacher, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_reloads_in_plain_transformers(family, tmp_path):
    student = make_student(deep(family), num_layers=2)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in student.state_dict().items())
    batch = tiny.inputs(family)
    assert torch.equal(tiny.logits(student, batch), tiny.logits(again, batch))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_causal_student_generates_with_its_cache(family):
    """Layers must be renumbered and per-layer lists trimmed, else the cache has holes (DESIGN trap 5)."""
    student = make_student(deep(family), layers=[1, 3])
    batch = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    runs = [student.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*runs)
    assert runs[0].shape == (1, 8)
    if hasattr(student.config, "layer_types"):
        assert len(student.config.layer_types) == 2


def test_per_layer_lists_follow_the_kept_layers():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen2Config(
        **{**tiny.CONFIGS["llama"], "num_hidden_layers": 4}, layer_types=kinds, use_sliding_window=True
    )
    student = make_student(Qwen2ForCausalLM(config), layers=[0, 3])
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]


def test_even_spread_keeps_first_and_last():
    assert spread_layers(12, 6) == [0, 2, 4, 7, 9, 11]
    assert spread_layers(6, 3) == [0, 2, 5]
    for depth in range(1, 30):
        for kept in range(1, depth + 1):
            layers = spread_layers(depth, kept)
            assert len(set(layers)) == kept
            assert layers[0] == 0
            assert kept == 1 or layers[-1] == depth - 1


def test_teacher_and_random_state_stay_as_they_were():
    teacher = deep("bert")
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    before = torch.random.get_rng_state()
    student = make_student(teacher, num_layers=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert teacher.config.num_hidden_layers == 4
    with torch.no_grad():
        student.classifier.weight.zero_()
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in state.items())


def test_record_counts_both_sides():
    teacher = deep("bert")
    step = report(make_student(teacher, num_layers=1)).steps[0]
    assert step.results["kept_layers"] == [0]
    assert step.before.parameters == sum(p.numel() for p in teacher.parameters())
    assert step.after.parameters < step.before.parameters


def test_tied_weights_stay_tied():
    student = make_student(tiny.model("gpt2", n_layer=4), num_layers=2)
    assert student.lm_head.weight.data_ptr() == student.transformer.wte.weight.data_ptr()


def test_dtype_is_kept():
    assert make_student(deep("bert").to(torch.bfloat16), num_layers=2).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Give one of num_layers and layers"),
        ({"num_layers": 2, "layers": [0]}, "Give one of num_layers and layers"),
        ({"num_layers": 0}, r"num_layers must be in 1\.\.4 for this teacher, got 0"),
        ({"num_layers": 5}, r"num_layers must be in 1\.\.4 for this teacher, got 5"),
        ({"layers": [0, 4]}, r"layers must be a list of different whole numbers in 0\.\.3, got \[0, 4\]"),
        ({"layers": [1, 1]}, r"different whole numbers .* got \[1, 1\]"),
        ({"layers": (n for n in (0, 1))}, "layers must be a list of different whole numbers .* got <generator"),
        ({"layers": 3}, r"layers must be a list of different whole numbers .* got 3"),
        ({"layers": "abc"}, r"layers must be a list of different whole numbers .* got 'abc'"),
        ({"layers": [0.7, 2]}, r"layers must be a list of different whole numbers .* got \[0\.7, 2\]"),
        ({"layers": [True, 2]}, r"layers must be a list of different whole numbers .* got \[True, 2\]"),
        ({"layers": []}, r"got \[\]"),
        ({"num_layers": True}, r"num_layers must be in 1\.\.4 for this teacher, got True"),
        ({"num_layers": 2, "keep": "best"}, "keep must be one of spread, first, last, influence, got 'best'"),
        ({"layers": [0], "keep": "last"}, r"needs num_layers= to say how many, layers=\[0\] names them already"),
        ({"hidden_size": 8, "keep": "first"}, "keep='first' says which layers stay, and needs num_layers="),
        ({"num_layers": 2, "keep": "influence"}, 'keep="influence" measures the layers on data. Give calibration='),
        ({"num_layers": 2, "calibration": []}, "calibration= is only read for .* keep='spread' needs none"),
        ({"num_layers": 2, "max_parameters": 9}, "max_parameters chooses the sizes itself. Leave out num_layers"),
        (
            {"max_size_bytes": 9, "max_latency_ms": 1, "hidden_size": 8},
            "max_size_bytes, max_latency_ms chooses .* hidd",
        ),
        ({"keep": "first"}, "Give one of num_layers and layers"),
        ({"num_layers": 2, "hidden_sise": 8}, "hidden_sise=8 is no width .* Did you mean hidden_size"),
        ({"num_layers": 2, "keep": "influence", "calibration": []}, "calibration data is empty"),
        ({"num_layers": 2, "keep": "influence", "calibration": 7}, "calibration must be a datasets.Dataset"),
    ],
)
def test_bad_layers(given, message):
    with pytest.raises(SettingError, match=message):
        make_student(deep("bert"), **given)


def test_family_without_one_stack_is_named():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with pytest.raises(UnsupportedModelError, match="family 't5' .* has 2 stacks"):
        make_student(T5ForConditionalGeneration(config), num_layers=1)


@pytest.mark.slow
def test_student_loads_in_a_process_without_hfshrink(tmp_path):
    make_student(deep("bert"), num_layers=2).save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoModelForSequenceClassification as A;"
        f"m = A.from_pretrained({str(tmp_path)!r}); assert 'hfshrink' not in sys.modules; "
        f"print(m.config.num_hidden_layers)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"


def test_compressed_teacher_is_refused():
    from hfshrink.checkpoint import set_layers
    from hfshrink.layers import ResizedLinear

    teacher = deep("bert")
    layer = teacher.bert.encoder.layer[0]
    set_layers(
        teacher,
        {
            "bert.encoder.layer.0.intermediate.dense": ResizedLinear.from_dense(
                layer.intermediate.dense, rows=torch.arange(12)
            ),
            "bert.encoder.layer.0.output.dense": ResizedLinear.from_dense(
                layer.output.dense, columns=torch.arange(12)
            ),
        },
    )
    with pytest.raises(UnsupportedModelError, match="compressed or quantized layers. Make it dense first"):
        make_student(teacher, num_layers=2)
