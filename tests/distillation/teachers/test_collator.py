"""A cached teacher's columns lie in the batch where the tokens lie."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    T5Config,
    default_data_collator,
)

import tiny
from hfshrink.distillation.teachers.collator import TeacherCollator, check_collator, check_inputs, teacher_outputs
from hfshrink.errors import SettingError


def padding(side="right", **kwargs):
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    return DataCollatorWithPadding(tokenizer, **kwargs)


def dense_rows():
    return [
        {"input_ids": [5, 6, 7], "teacher_logits": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]},
        {"input_ids": [8], "teacher_logits": [[7.0, 8.0]]},
    ]


def sparse_rows(last="teacher_counts", scale=1):
    return [
        {"input_ids": [5, 6], "teacher_ids": [[1], [2, 9, 4]], last: [[4 * scale], [1 * scale, 1 * scale, 2 * scale]]},
        {"input_ids": [8], "teacher_ids": [[3, 7]], last: [[3 * scale, 1 * scale]]},
    ]


def test_rows_without_a_teacher_pass_through():
    rows = [{"input_ids": [5, 6]}, {"input_ids": [7]}]
    ours, theirs = TeacherCollator(padding())(rows), padding()(rows)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert teacher_outputs(ours, "tokens") is None


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 4])
def test_logits_are_padded_where_the_tokens_are(side, multiple):
    batch = TeacherCollator(padding(side, pad_to_multiple_of=multiple))(dense_rows())
    real = batch["attention_mask"].bool()
    assert batch["teacher_logits"].shape == (*batch["input_ids"].shape, 2)
    assert batch["teacher_logits"][real].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert (batch["teacher_logits"][~real] == -1e4).all()


def test_the_side_is_found_without_a_mask_or_tokenizer():
    def left(rows):
        return {"input_ids": torch.tensor([[5, 6, 7], [0, 0, 8]])}

    batch = TeacherCollator(left)(dense_rows())
    assert batch["teacher_logits"][1].tolist() == [[-1e4, -1e4], [-1e4, -1e4], [7, 8]]


def test_a_token_like_the_padding_goes_to_the_tokenizers_side():
    rows = [{"input_ids": [0], "teacher_logits": [[1.0]]}, {"input_ids": [0, 0], "teacher_logits": [[2.0], [3.0]]}]
    for side, expected in (("right", [1, -1e4]), ("left", [-1e4, 1])):
        assert TeacherCollator(padding(side))(rows)["teacher_logits"][0, :, 0].tolist() == expected


@pytest.mark.parametrize("side", ["right", "left"])
def test_draws_become_probabilities(side):
    batch = TeacherCollator(padding(side))(sparse_rows())
    found = teacher_outputs(batch, "causal_tokens").sparse
    only = 0 if side == "right" else 1
    assert found.ids.dtype == torch.int64
    assert found.ids[0].tolist() == [[1, 0, 0], [2, 9, 4]]
    assert found.probabilities[0].tolist() == [[1, 0, 0], [0.25, 0.25, 0.5]]
    assert found.ids[1, only].tolist() == [3, 7, 0]
    assert found.probabilities[1, only].tolist() == [0.75, 0.25, 0]
    assert not found.probabilities[1, 1 - only].any()
    assert found.tail is False


def test_largest_probabilities_have_a_tail():
    batch = TeacherCollator(padding())(sparse_rows("teacher_probabilities", scale=0.125))
    found = teacher_outputs(batch, "tokens").sparse
    assert found.tail is True
    assert found.probabilities[0].tolist() == [[0.5, 0, 0], [0.125, 0.125, 0.25]]
    above = {"teacher_ids": torch.tensor([[[1]]]), "teacher_probabilities": torch.tensor([[[1.5]]])}
    assert teacher_outputs(above, "tokens").sparse.probabilities.item() == 1.0


def test_one_answer_per_example_is_stacked():
    rows = [{"input_ids": [5, 6], "labels": 1, "teacher_logits": [0.1, 0.2, 0.3]}] * 2
    batch = TeacherCollator(default_data_collator)(rows)
    assert torch.equal(teacher_outputs(batch, "single_label").logits, torch.tensor([[0.1, 0.2, 0.3]] * 2))
    assert "teacher_logits" in rows[0]  # the caller's rows stay as they are


def test_padded_positions_are_no_start_and_no_end():
    batch = TeacherCollator(padding())(dense_rows())
    without = {name: value for name, value in batch.items() if name != "attention_mask"}
    found = teacher_outputs(without, "span")
    assert found.start_logits[0].tolist() == [1, 3, 5]
    assert found.end_logits[0].tolist() == [2, 4, 6]
    assert found["start_logits"][1].softmax(-1).tolist() == [1, 0, 0]


def test_only_what_lies_behind_a_row_is_filled():
    """A row may bring padding of its own: the teacher has an answer there, though it is 0."""
    row = {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "teacher_logits": [[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]}
    found = teacher_outputs(TeacherCollator(padding(pad_to_multiple_of=4))([row]), "span")
    assert found.start_logits.tolist() == [[1, 3, 0, -1e4]]
    assert found.end_logits.tolist() == [[2, 4, 0, -1e4]]


def test_tensors_are_taken_like_lists():
    rows = [{name: torch.tensor(value) for name, value in row.items()} for row in dense_rows()]
    batch = TeacherCollator(padding())(rows)
    assert torch.equal(batch["teacher_logits"], TeacherCollator(padding())(dense_rows())["teacher_logits"])


def test_target_tokens_carry_the_answers_of_an_encoder_decoder():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [8], "teacher_logits": [[1.0]]},
        {"input_ids": [5], "labels": [8, 9], "teacher_logits": [[2.0], [3.0]]},
    ]
    batch = TeacherCollator(lambda rows: {"labels": torch.tensor([[8, -100], [8, 9]])})(rows)
    assert batch["teacher_logits"][..., 0].tolist() == [[1, -1e4], [2, 3]]


def same_lengths(rows):
    """Inputs padded to 4, targets to 2, as a tokenizer with pad_to_multiple_of does."""
    ids = torch.tensor([row["input_ids"] + [0] * (4 - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (2 - len(row["labels"])) for row in rows])
    return {"input_ids": ids, "labels": labels}


def test_answers_lie_at_the_target_where_input_and_target_are_equally_long():
    rows = [
        {"input_ids": [5], "labels": [8], "teacher_logits": [[1.0]]},
        {"input_ids": [5, 6], "labels": [8, 9], "teacher_logits": [[2.0], [3.0]]},
    ]

    def with_starts(rows):
        return {**same_lengths(rows), "decoder_input_ids": torch.tensor([[0, 8], [0, 8]])}

    class WithModel:
        model = SimpleNamespace(config=T5Config())

        def __call__(self, rows):
            return same_lengths(rows)

    for collator in (TeacherCollator(same_lengths, True), TeacherCollator(with_starts), TeacherCollator(WithModel())):
        assert collator(rows)["teacher_logits"][..., 0].tolist() == [[1, -1e4], [2, 3]]
    assert TeacherCollator(same_lengths)(rows)["teacher_logits"].shape == (2, 4, 1)


def test_random_masks_are_refused():
    masking = DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=True)
    with pytest.raises(SettingError, match="DataCollatorForLanguageModeling masks other tokens in every epoch"):
        TeacherCollator(masking)
    check_collator(DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=False))


@pytest.mark.parametrize(
    ("inner", "rows", "message"),
    [
        (padding(), [*dense_rows(), {"input_ids": [5]}], "Some rows of a batch have teacher_logits, others not"),
        (
            padding(),
            [{"input_ids": [5, 6], "teacher_logits": [[1.0]]}],
            r"answers have \[1\] positions, the rows' input_ids \[2\]: the rows were cut",
        ),
        (lambda rows: {"input_ids": torch.full((2, 3), 4)}, dense_rows(), "collator changed the column 'input_ids'"),
        (lambda rows: {"input_ids": torch.tensor([[5, 6, 7, 8]])}, dense_rows(), "cut, masked or joined rows"),
        (lambda rows: {"input_ids": torch.tensor([[5, 6], [8, 0]])}, dense_rows(), "cut, masked or joined rows"),
    ],
)
def test_batches_that_do_not_fit_are_refused(inner, rows, message):
    with pytest.raises(SettingError, match=message):
        TeacherCollator(inner)(rows)


READ = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "bbox", "pixel_values"}
ROWS = [
    {"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1], "token_type_ids": [0, 1, 1], "bbox": [[1, 2]] * 3},
    {"input_ids": [8], "attention_mask": [1], "token_type_ids": [1], "bbox": [[3, 4]]},
]
FITTING = {
    "right": {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "attention_mask": [[1, 0, 1], [1, 0, 0]],
        "token_type_ids": [[0, 1, 1], [1, 9, 9]],
        "bbox": [[[1, 2]] * 3, [[3, 4], [0, 0], [0, 0]]],
    },
    "left": {
        "input_ids": [[5, 6, 7], [0, 0, 8]],
        "attention_mask": [[1, 0, 1], [0, 0, 1]],
        "token_type_ids": [[0, 1, 1], [9, 9, 1]],
        "bbox": [[[1, 2]] * 3, [[0, 0], [0, 0], [3, 4]]],
    },
}


def tensors(columns):
    return {name: torch.tensor(value) for name, value in columns.items()}


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_masks_and_positions_are_the_collators_to_make(side):
    batch = tensors(FITTING[side])
    check_inputs(ROWS, {**batch, "position_ids": torch.arange(3).expand(2, 3), "labels": torch.ones(2)}, READ)
    plain = [{name: row[name] for name in ("input_ids", "token_type_ids", "bbox")} for row in ROWS]
    made = (batch["input_ids"] != 0).long()
    check_inputs(plain, {**batch, "attention_mask": made}, READ)
    whole = [{"input_ids": [5, 6]}, {"input_ids": [7, 8]}]
    check_inputs(whole, tensors({"input_ids": [[5, 6], [7, 8]]}), READ)  # no padding and no mask


def test_a_target_is_padded_on_its_own_side():
    rows = [{"input_ids": [5, 6], "decoder_input_ids": [0, 8, 9]}, {"input_ids": [7], "decoder_input_ids": [3]}]
    batch = {
        "input_ids": [[5, 6], [0, 7]],
        "attention_mask": [[1, 1], [0, 1]],
        "decoder_input_ids": [[0, 8, 9], [3, 0, 0]],
    }
    check_inputs(rows, tensors(batch), {*READ, "decoder_input_ids"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b["token_type_ids"].fill_(0), "changes 'token_type_ids'"),
        (lambda b: b.update(token_type_ids=b["token_type_ids"].flip(1)), "changes 'token_type_ids'"),
        (lambda b: b.update(token_type_ids=b["token_type_ids"][:1]), "changes 'token_type_ids'"),
        (lambda b: b["bbox"].mul_(2), "changes 'bbox'"),
        (lambda b: b["attention_mask"].fill_(1), "changes 'attention_mask'"),
        (lambda b: b.pop("attention_mask"), "changes 'attention_mask'"),  # a model reads the padding then
        (lambda b: b.pop("token_type_ids"), "drops 'token_type_ids'"),
        (lambda b: b.update(pixel_values=torch.ones(2, 3)), "adds 'pixel_values'"),
        (lambda b: b["input_ids"].fill_(1), "changed the column 'input_ids'"),
    ],
)
def test_other_changes_of_a_collator_are_refused(change, message):
    batch = tensors(FITTING["right"])
    change(batch)
    with pytest.raises(SettingError, match=message):
        check_inputs(ROWS, batch, READ)


def test_numbers_are_held_against_each_other_in_the_batchs_type():
    rows = [{"pixel_values": [[0.1, 0.2]]}, {"pixel_values": [[0.3, 0.4]]}]
    pixels = torch.tensor([[[0.1, 0.2]], [[0.3, 0.4]]])
    check_inputs(rows, {"pixel_values": pixels.half()}, READ)
    for changed in (pixels * 2, (pixels * 255).to(torch.uint8), pixels[:, 0], pixels.flip(0)):
        with pytest.raises(
            SettingError, match="changes 'pixel_values', which the teacher reads.*Do it before caching"
        ):
            check_inputs(rows, {"pixel_values": changed}, READ)
