"""Fresh students of another family: the teacher's task, labels and inputs, seeded weights."""

import pytest
import torch

import tiny
from hfshrink import make_student, report
from hfshrink.errors import SettingError
from hfshrink.modules import max_positions

LABELS = {"id2label": {0: "bad", 1: "so-so", 2: "good"}, "label2id": {"bad": 0, "so-so": 1, "good": 2}}
SMALL = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
SQUEEZE = {**SMALL, "embedding_size": 8}
SQUEEZE |= dict.fromkeys(("q_groups", "k_groups", "v_groups", "intermediate_groups", "output_groups"), 2)
MOBILE = {**SMALL, "embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8}
CHANNELS = {"depth_multiplier": 0.1, "min_depth": 4}

CASES = [
    ("bert", None, "squeezebert", SQUEEZE, "SqueezeBertForSequenceClassification"),
    ("bert", None, "mobilebert", MOBILE, "MobileBertForSequenceClassification"),
    ("bert", None, "roberta", SMALL, "RobertaForSequenceClassification"),
    ("roberta", None, "bert", SMALL, "BertForSequenceClassification"),
    ("distilbert", "token-classification", "electra", SMALL, "ElectraForTokenClassification"),
    ("bert", "question-answering", "distilbert", {"dim": 8, "n_heads": 2, "hidden_dim": 8, "n_layers": 1}, None),
    ("bert", "fill-mask", "bert", SMALL, "BertForMaskedLM"),
    ("llama", None, "gpt2", {"n_embd": 8, "n_head": 2, "n_layer": 1}, "GPT2LMHeadModel"),
    ("vit", None, "mobilenet_v1", CHANNELS, "MobileNetV1ForImageClassification"),
    ("vit", None, "mobilenet_v2", CHANNELS, "MobileNetV2ForImageClassification"),
    ("vit", None, "resnet", {"depths": [1, 1], "hidden_sizes": [4, 8], "embedding_size": 4}, None),
    ("resnet", None, "vit", {**SMALL, "patch_size": 4}, "ViTForImageClassification"),
    ("bert", "feature-extraction", "distilbert", {"dim": 8, "n_heads": 2, "hidden_dim": 8, "n_layers": 1}, None),
]


@pytest.mark.parametrize(("family", "task", "architecture", "config", "name"), CASES)
def test_student_of_another_family_reads_what_the_teacher_reads(family, task, architecture, config, name, tmp_path):
    labels = LABELS if "classification" in (task or tiny.TASK[family]) else {}
    teacher, batch = tiny.model(family, task, **labels), tiny.inputs(family, length=9)
    if family == "resnet":
        batch = {"pixel_values": torch.randn(2, 3, 224, 224)}
    student = make_student(teacher, architecture=architecture, **config)
    with torch.no_grad():
        old, new = teacher(**batch)[0], student(**batch)[0]
    if task != "feature-extraction":
        assert old.shape == new.shape
    assert student.config.model_type == architecture
    assert name is None or type(student).__name__ == name
    if labels:
        assert student.config.id2label == LABELS["id2label"]
        assert student.config.label2id == LABELS["label2id"]
    assert student.config.problem_type == teacher.config.problem_type
    assert not student.training
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    kept = student.state_dict()
    assert all(torch.equal(value, kept[key]) for key, value in again.state_dict().items())
    with torch.no_grad():  # convolutions round by the threads that they run on
        assert torch.allclose(again(**batch)[0], new)


def test_record_counts_fresh_weights_and_names_what_came_from_the_teacher():
    sizes = {"dim": 8, "n_heads": 2, "hidden_dim": 8}
    student = make_student(tiny.model("bert", **LABELS), architecture="distilbert", num_layers=2, **sizes)
    step = report(student).steps[0]
    assert student.config.n_layers == 2
    assert step.method == "architecture"
    assert step.results["copied_parameters"] == 0
    assert step.results["fresh_parameters"] == sum(p.numel() for p in student.parameters())
    assert {"vocab_size", "id2label", "max_position_embeddings"} <= set(step.results["from_teacher"])
    assert step.modules == ["distilbert", "pre_classifier", "classifier"]
    assert step.settings == {"num_layers": 2, "layers": None, "architecture": "distilbert", **sizes}
    assert step.before.parameters == sum(p.numel() for p in tiny.model("bert", **LABELS).parameters())


def test_weights_are_seeded_and_the_random_state_stays():
    before = torch.random.get_rng_state()
    one = make_student(tiny.model("bert"), architecture="roberta", **SMALL)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(7)
    other = make_student(tiny.model("bert"), architecture="roberta", **SMALL)
    assert all(torch.equal(a, other.state_dict()[name]) for name, a in one.state_dict().items())
    assert one.roberta.encoder.layer[0].output.dense.weight.std() > 0


@pytest.mark.parametrize(
    ("family", "architecture", "positions"),
    [("bert", "distilbert", 34), ("bert", "roberta", 35), ("roberta", "bert", 33), ("roberta", "roberta", 34)],
)
def test_student_reads_as_many_tokens_as_its_teacher(family, architecture, positions):
    """RoBERTa's positions begin behind the padding id (0 here): it needs one row more than it reads."""
    sizes = {"dim": 8, "n_heads": 2, "hidden_dim": 8, "n_layers": 1} if architecture == "distilbert" else SMALL
    student = make_student(tiny.model(family), architecture=architecture, **sizes)
    assert student.config.max_position_embeddings == positions
    assert student.config.vocab_size == tiny.VOCABULARY
    assert student.config.pad_token_id == 0


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(
    "architecture", ["mpnet", "ibert", "esm", "data2vec-text", "roberta-prelayernorm", "xlm-roberta", "bert"]
)
def test_student_reads_its_teachers_longest_input(family, architecture):
    teacher = tiny.model(family)
    longest = max_positions(teacher)
    student = make_student(teacher, architecture=architecture, **SMALL)
    inputs = {"input_ids": torch.full((1, longest), 9), "attention_mask": torch.ones(1, longest).long()}
    assert student(**inputs).logits.shape == (1, 2)


def test_shorter_student_on_request():
    student = make_student(tiny.model("bert"), architecture="roberta", max_position_embeddings=11, **SMALL)
    assert student.config.max_position_embeddings == 11
    assert max_positions(student) == 10
    assert "max_position_embeddings" not in report(student).steps[0].results["from_teacher"]


def test_own_entry_in_another_spelling_comes_before_the_teachers():
    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 1}
    for name in ("n_positions", "max_position_embeddings"):
        student = make_student(tiny.model("llama"), architecture="gpt2", **sizes, **{name: 9})
        assert student.config.n_positions == 9
        taken = report(student).steps[0].results["from_teacher"]
        assert not {"n_positions", "max_position_embeddings"} & set(taken)


def test_token_ids_come_along():
    student = make_student(tiny.model("llama"), architecture="gpt2", n_embd=8, n_head=2, n_layer=1)
    assert (student.config.bos_token_id, student.config.eos_token_id) == (2, 3)
    output = student.generate(torch.tensor([[7, 8]]), attention_mask=torch.ones(1, 2), max_new_tokens=2)
    assert output.shape[1] <= 4
    student = make_student(tiny.model("bert"), architecture="gpt2", n_embd=8, n_head=2, n_layer=1)
    assert student.config.eos_token_id is None  # 50256 is no word of this vocabulary


def test_image_size_and_channels_come_along():
    teacher = tiny.model("vit", image_size=12, num_channels=1)
    student = make_student(teacher, architecture="mobilenet_v2", **CHANNELS)
    assert (student.config.image_size, student.config.num_channels) == (12, 1)
    assert student(pixel_values=torch.zeros(2, 1, 12, 12)).logits.shape == (2, 2)


def test_mobilenet_brings_depthwise_separable_convolutions():
    """Each of its 13 layers is one filter per channel, then a 1x1 convolution across the channels."""
    student = make_student(tiny.model("vit"), architecture="mobilenet_v1", **CHANNELS)
    convolutions = [module for module in student.modules() if isinstance(module, torch.nn.Conv2d)]
    depthwise, pointwise = convolutions[1::2], convolutions[2::2]
    assert len(depthwise) == len(pointwise) == 13
    assert all(module.groups == module.in_channels == module.out_channels for module in depthwise)
    assert all(module.kernel_size == (1, 1) and module.groups == 1 for module in pointwise)


def test_dtype_is_the_teachers():
    student = make_student(tiny.model("bert").to(torch.bfloat16), architecture="bert", **SMALL)
    assert student.dtype == torch.bfloat16


def test_teachers_problem_type_comes_along():
    teacher = tiny.model("bert", problem_type="multi_label_classification")
    assert make_student(teacher, architecture="roberta", **SMALL).config.problem_type == "multi_label_classification"


@pytest.mark.parametrize(
    ("family", "architecture", "given", "message"),
    [
        ("bert", "mobilenet", {}, "'mobilenet' is no model_type that transformers knows. Near it are .*mobilenet_v"),
        ("bert", "qqqq", {}, "'qqqq' is no model_type .* Try mobilenet_v2, resnet"),
        (
            "bert",
            "mobilenet_v2",
            {},
            r"BertForSequenceClassification reads input_ids \(text\), a student of the architecture 'mobilenet_v2' "
            r"reads pixel_values \(images\)",
        ),
        ("vit", "bert", {}, r"ViTForImageClassification reads pixel_values \(images\), .* 'bert' reads input_ids"),
        ("llama", "distilbert", {}, "'distilbert' has no head for the teacher's task, text-generation. .*gpt2"),
        ("vit", "resnet", {"depth": [1]}, r"'resnet' has no entry 'depth' \(got \[1\]\). Near it are depths"),
        ("bert", "bert", {"vocab_size": 9}, "vocab_size=9: the student takes vocab_size from its teacher"),
        ("bert", "bert", {"num_labels": 9}, "num_labels=9: the student takes num_labels from its teacher"),
        ("bert", "bert", {"hidden_size": "wide"}, r"config of 'bert' refuses .*wide"),
        ("bert", "bert", {"hidden_size": 9, "num_attention_heads": 2}, r"'bert' with \{'hidden_size': 9.* can't be"),
        ("vit", "resnet", {"num_layers": 2}, "'resnet' has no number of layers; give its own entries: .*depths"),
        ("bert", "bert", {"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
        ("bert", "bert", {"num_layers": True}, "num_layers must be a whole number of at least 1, got True"),
        (
            "bert",
            "distilbert",
            {"num_layers": 2, "n_layers": 1},
            "n_layers of a 'distilbert' is given twice, .* n_layers=1, num_hidden_layers=2",
        ),
        ("bert", "distilbert", {"dim": 8, "hidden_size": 8}, "dim of a 'distilbert' is given twice"),
        ("bert", "bert", {"pad_token_id": 3}, "pad_token_id=3: the student takes pad_token_id from its teacher"),
        ("llama", "gpt2", {"eos_token_id": 9}, "eos_token_id=9: the student takes eos_token_id from its teacher"),
        ("bert", "bert", {**SMALL, "hidden_act": "best"}, "A 'bert' with .*best.* can't be built"),
        ("vit", "vit", SMALL, "A 'vit' of these sizes can't read an image of the teacher's size"),
        (
            "bert",
            "bart",
            {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
            "'bart' of these sizes can't read 34 tokens, .*no eos_token_id",
        ),
        ("bert", "bert", {"layers": [0]}, "architecture= makes a fresh student"),
        ("bert", "bert", {"keep": "first"}, "architecture= makes a fresh student"),
        ("bert", "bert", {"max_parameters": 9}, "architecture= makes a fresh student"),
        ("bert", "bert", {"calibration": []}, "architecture= makes a fresh student"),
    ],
)
def test_bad_architectures(family, architecture, given, message):
    with pytest.raises(SettingError, match=message):
        make_student(tiny.model(family), architecture=architecture, **given)
