"""The student's own continuations: equal to generating row by row, labelled where it wrote."""

import pytest
import torch

import tiny
from hfshrink.distillation.texts.on_policy import OnPolicy, generate_batch, is_on_policy_step
from hfshrink.errors import SettingError

GREEDY = OnPolicy(share=1.0, max_new_tokens=6, temperature=0.0)


def batch(family, left=False):
    """Rows of 7, 6 and 5 tokens whose prompts have 2, 3 and 4; padded on the right or on the left."""
    inputs = tiny.inputs(family)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row in range(3):
        labels[row, : 2 + row] = -100
    inputs["labels"] = labels
    if left:
        inputs = {name: torch.stack([r.roll(i) for i, r in enumerate(value)]) for name, value in inputs.items()}
    return inputs


def alone(model, prompt, **kwargs):
    """What the model writes after one prompt without padding."""
    with torch.no_grad():
        made = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), pad_token_id=0, **kwargs)
    return made[0]


@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_batch_of_prompts_gives_what_each_gives_alone(family, left):
    model, inputs = tiny.model(family, seed=4), batch(family)
    made = generate_batch(model, batch(family, left), GREEDY)
    for row in range(3):
        prompt = inputs["input_ids"][row, : 2 + row]
        expected = alone(model, prompt, do_sample=False, max_new_tokens=6)
        length = int(made["attention_mask"][row].sum())
        assert made["input_ids"][row, :length].tolist() == expected.tolist()
        assert made["attention_mask"][row].tolist() == [1] * length + [0] * (made["input_ids"].shape[1] - length)
        labels = made["labels"][row]
        assert (labels[: 2 + row] == -100).all()
        assert torch.equal(labels[2 + row : length], expected[2 + row :])
        assert (labels[length:] == -100).all()
    assert {name: value.dtype for name, value in made.items()} == dict.fromkeys(made, torch.int64)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_row_ends_with_its_end_token(family):
    model, inputs = tiny.model(family, seed=4), batch(family)
    free = generate_batch(model, inputs, GREEDY)
    end = int(free["input_ids"][0, 2 + 2])  # the third token that the first row writes
    model.generation_config.eos_token_id = [end, 3]
    made = generate_batch(model, inputs, GREEDY)
    first = free["input_ids"][0].tolist().index(end, 2)
    assert made["input_ids"][0, : first + 1].tolist() == free["input_ids"][0, : first + 1].tolist()
    assert int(made["labels"][0, first]) == end
    assert (made["labels"][0, first + 1 :] == -100).all()
    assert int(made["attention_mask"][0].sum()) == first + 1


def test_the_tokenizers_end_token_counts_too():
    class Ends:
        eos_token_id = None

    model, inputs = tiny.model("llama", seed=4), batch("llama")
    Ends.eos_token_id = int(generate_batch(model, inputs, GREEDY)["input_ids"][0, 2])
    made = generate_batch(model, inputs, GREEDY, Ends())
    assert (made["labels"][0] != -100).sum() == 1


def test_a_row_that_is_all_labels_is_cut_in_half():
    inputs = tiny.inputs("llama", batch=2, length=7)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for given in (inputs, {name: value for name, value in inputs.items() if name != "labels"}):
        made = generate_batch(tiny.model("llama"), given, GREEDY)
        assert (made["labels"] != -100).int().argmax(1).tolist() == [3, 3]
        assert torch.equal(made["input_ids"][:, :3], inputs["input_ids"][:, :3])


def test_a_row_without_labels_is_all_prompt():
    inputs = {**tiny.inputs("gpt2", batch=1, length=4), "labels": torch.full((1, 4), -100)}
    made = generate_batch(tiny.model("gpt2"), inputs, GREEDY)
    assert torch.equal(made["input_ids"][:, :4], inputs["input_ids"])
    assert (made["labels"][0] != -100).int().argmax().item() == 4


def test_the_seed_decides_and_the_global_state_stays():
    model, inputs = tiny.model("llama", seed=4), batch("llama")
    warm = OnPolicy(max_new_tokens=6, temperature=1.5)
    state = torch.get_rng_state()
    one, same, other = (generate_batch(model, inputs, warm, seed=seed)["input_ids"].tolist() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert one == same != other
    generate_batch(model, inputs, warm)
    assert not torch.equal(torch.get_rng_state(), state)


def test_sampling_is_from_the_plain_distribution_whatever_the_generation_config_says():
    model, prompt = tiny.model("llama", seed=4), torch.full((4000, 1), 7)
    model.generation_config.update(top_k=1, top_p=0.1, repetition_penalty=3.0, temperature=0.1, num_beams=2)
    inputs = {"input_ids": prompt, "labels": torch.full_like(prompt, -100)}
    made = generate_batch(model, inputs, OnPolicy(max_new_tokens=1, temperature=2.0), seed=0)
    counts = torch.bincount(made["input_ids"][:, 1], minlength=tiny.VOCABULARY) / 4000
    chance = torch.softmax(tiny.logits(model, {"input_ids": prompt[:1]})[0, -1] / 2.0, -1)
    assert (counts - chance).abs().sum() < 0.12  # total variation of 4000 draws


@pytest.mark.parametrize(
    "settings",
    [
        {"min_p": 0.9},
        {"suppress_tokens": list(range(5, 30))},
        {"num_return_sequences": 2},
        {"return_dict_in_generate": True},
        {"stop_strings": ["a"]},
    ],
    ids=str,
)
def test_the_models_own_generation_settings_change_nothing(settings):
    model, warm = tiny.model("llama", seed=4), OnPolicy(max_new_tokens=6, temperature=1.5)
    expected = generate_batch(model, batch("llama"), warm, seed=0)["input_ids"]
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    assert torch.equal(generate_batch(model, batch("llama"), warm, seed=0)["input_ids"], expected)
    assert model.generation_config is own


def test_no_token_of_a_large_vocabulary_is_left_out():
    model, prompt = tiny.model("llama", vocab_size=200), torch.full((2000, 1), 7)
    inputs = {"input_ids": prompt, "labels": torch.full_like(prompt, -100)}
    made = generate_batch(model, inputs, OnPolicy(max_new_tokens=1, temperature=100.0), seed=0)
    assert len(made["input_ids"][:, 1].unique()) > 190  # transformers' own top_k is 50


def test_the_model_keeps_its_training_flags_and_gets_no_gradient():
    model = tiny.model("gpt2").train()
    model.transformer.h[0].eval()
    flags = [module.training for module in model.modules()]
    kept = model.generation_config.to_dict()
    made = generate_batch(model, batch("gpt2"), GREEDY)
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.generation_config.to_dict() == kept
    assert torch.equal(made["input_ids"], generate_batch(model.eval(), batch("gpt2"), GREEDY)["input_ids"])


def test_continuations_stop_where_the_positions_end():
    inputs = tiny.inputs("gpt2", batch=2, length=31)
    inputs["labels"] = torch.full((2, 31), -100)
    made = generate_batch(tiny.model("gpt2"), inputs, OnPolicy(max_new_tokens=100, temperature=0.0))
    assert made["input_ids"].shape[1] <= 34
    full = tiny.inputs("gpt2", batch=1, length=34)
    with pytest.raises(SettingError, match="longest prompt has 34 tokens, and the student reads at most 34"):
        generate_batch(tiny.model("gpt2"), {**full, "labels": torch.full((1, 34), -100)}, GREEDY)


def test_the_coin_has_the_right_share_and_depends_on_seed_and_step_alone():
    throws = [is_on_policy_step(step, 0.3, seed=5) for step in range(4000)]
    assert sum(throws) / 4000 == pytest.approx(0.3, abs=0.03)
    assert throws == [is_on_policy_step(step, 0.3, seed=5) for step in range(4000)]
    assert throws != [is_on_policy_step(step, 0.3, seed=6) for step in range(4000)]
    assert all(is_on_policy_step(step, 1.0) and not is_on_policy_step(step, 0.0) for step in range(100))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.1}, r"share must be a number in \[0, 1\], got 1.1"),
        ({"temperature": -1}, "temperature must be a number of at least 0, got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1 on, got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number from 1 on, got 1.5"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SettingError, match=message):
        OnPolicy(**settings)


def test_rows_that_can_not_be_continued():
    inputs = batch("llama")
    with pytest.raises(SettingError, match="holds teacher_logits, which belongs to its rows as they were"):
        generate_batch(tiny.model("llama"), {**inputs, "teacher_logits": torch.zeros(3, 7, 2)}, GREEDY)
    mask = inputs["attention_mask"] * torch.tensor([[1], [0], [1]])
    with pytest.raises(SettingError, match="Row 1 of the batch has no tokens"):
        generate_batch(tiny.model("llama"), {**inputs, "attention_mask": mask}, GREEDY)
