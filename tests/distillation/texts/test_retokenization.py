"""One text, two tokenizers: pairs of positions that have read the same characters."""

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from hfshrink.distillation.losses.logits import CrossTokenizerLoss
from hfshrink.distillation.texts.retokenization import retokenize
from hfshrink.errors import SettingError

TEXTS = ["the cat is good", "a very long and boring movie", "the dog eats  fish", "the sun was warm é😀 ok"]


def characters():
    """One token per character, no marks at the ends."""
    known = {token: i for i, token in enumerate(["[UNK]", *"abcdefghijklmnopqrstuvwxyz "])}
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


CODE = "def f(x):\n        return x"


def byte_level(trim=True, start=False, texts=TEXTS, size=290):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator([*texts] * 5, trainer)
    marks = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim), *([marks] if start else [])])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def word_pieces():
    """Lower case, no accents, pieces of words, `[CLS] … [SEP]`."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *tiny.WORDS, *"abcdefghijklmnopqrstuvwxyz"]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def batch(tokenizer, texts, left=False):
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ids = [pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)]
    mask = [
        [len(p) * [0] + len(r) * [1], len(r) * [1] + len(p) * [0]][not left] for r, p in zip(rows, pads, strict=True)
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def pairs(view):
    return list(zip(view.rows.tolist(), view.student_positions.tolist(), view.teacher_positions.tolist(), strict=True))


@pytest.mark.parametrize(
    "make",
    [
        byte_level,
        lambda: byte_level(trim=False),
        lambda: byte_level(start=True),
        characters,
        word_pieces,
        tiny.tokenizer,
    ],
    ids=["byte-level", "untrimmed", "with start", "characters", "word pieces", "words"],
)
def test_the_same_tokenizer_on_both_sides_pairs_every_position_with_itself(make):
    tokenizer = make()
    texts = [*TEXTS[:2], "the dog eats fish"]
    inputs = batch(tokenizer, texts)
    view = retokenize(inputs, tokenizer, tokenizer)
    assert torch.equal(view.inputs["input_ids"] * view.inputs["attention_mask"], inputs["input_ids"])
    assert torch.equal(view.inputs["attention_mask"], inputs["attention_mask"])
    wanted = inputs["attention_mask"][:, 1:].bool()  # each position whose next token is real
    assert pairs(view) == [(row, p, p) for row, p in wanted.nonzero().tolist()]


def test_letters_meet_words_at_the_ends_of_words():
    student, teacher = characters(), tiny.tokenizer()
    view = retokenize(batch(student, ["a cat is"]), student, teacher)
    assert teacher.convert_ids_to_tokens(view.inputs["input_ids"][0].tolist()) == ["[CLS]", "a", "cat", "is", "[SEP]"]
    assert pairs(view) == [(0, 0, 1), (0, 4, 2)]  # behind "a", behind "a cat"; nothing is predicted behind "is"
    back = retokenize(batch(teacher, ["a cat is"]), teacher, student)
    assert pairs(back) == [(0, 1, 0), (0, 2, 4), (0, 3, 7)]  # behind "is" the student predicts its [SEP]


def brute_force(student, teacher, text):
    """Pairs of text positions by decoding every prefix on both sides; the last of equal prefixes counts."""

    def prefixes(tokenizer):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        read = [tokenizer.decode(ids[: i + 1], clean_up_tokenization_spaces=False) for i in range(len(ids))]
        return {prefix: i for i, prefix in enumerate(read) if text.startswith(prefix)}, len(ids)

    (ours, length), (theirs, _) = prefixes(student), prefixes(teacher)
    return [(ours[p], theirs[p]) for p in sorted(ours.keys() & theirs.keys(), key=len) if ours[p] < length - 1]


@pytest.mark.parametrize(
    "text", ["the cat  is\ngood", "a sun\u00e9 \U0001f600\U0001f600 ok ", "  the dog", CODE, "日本語 é😀"]
)
@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("swap", [False, True])
def test_pairs_equal_those_of_decoding_every_prefix(text, trim, swap):
    student, teacher = byte_level(trim), byte_level(trim, texts=["é😀 the dog", CODE, "本語"], size=310)
    assert any("Ċ" in token and "Ġ" in token for token in teacher.get_vocab())  # a line's end and an indentation
    if swap:
        student, teacher = teacher, student
    found = [(s, t) for _, s, t in pairs(retokenize(batch(student, [text]), student, teacher))]
    expected = brute_force(student, teacher, text)
    ids = student(text)["input_ids"]
    # trimmed offsets do not tell of every token that ends in blanks
    behind_blanks = [pair for pair in expected if student.decode(ids[: pair[0] + 1])[-1].isspace()]
    assert found == [pair for pair in expected if pair in found or not (trim and pair in behind_blanks)]
    assert found


def test_a_token_that_ends_within_a_character_is_not_paired():
    def bytes_of(*merges):
        tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
        made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="!")

    student, teacher = bytes_of(("©", "x")), bytes_of()  # é is Ã and ©
    inputs = batch(student, ["aéxa!"])
    assert student.convert_ids_to_tokens(inputs["input_ids"][0].tolist()) == ["a", "Ã", "©x", "a", "!"]
    assert pairs(retokenize(inputs, student, teacher)) == [(0, 0, 0), (0, 2, 3), (0, 3, 4)]


def test_start_marks_are_paired_where_both_have_one():
    student, teacher = byte_level(start=True), word_pieces()
    view = retokenize(batch(student, ["the cat is good"]), student, teacher)
    assert pairs(view)[0] == (0, 0, 0)  # <s> with [CLS]
    bare = byte_level()
    assert pairs(retokenize(batch(bare, ["the cat is good"]), bare, teacher))[0][2] != 0


def test_padding_on_the_left_shifts_the_students_positions():
    student, teacher, texts = byte_level(), word_pieces(), ["the cat is good", "a very long and boring movie"]
    right, left = (batch(student, texts, left=side) for side in (False, True))
    shift = (right["attention_mask"] == 0).sum(1).tolist()
    moved = [(row, s + shift[row], t) for row, s, t in pairs(retokenize(right, student, teacher))]
    assert pairs(retokenize(left, student, teacher)) == moved


def test_tokens_that_swallow_the_blank_behind_them_are_left_out():
    known = {"<s>": 0, "aĠ": 1, "b": 2, "a": 3, "Ġ": 4}
    made = Tokenizer(models.BPE(known, [("a", "Ġ")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder, made.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    student = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    inputs = batch(student, ["a bb"])
    assert student("a bb", return_offsets_mapping=True)["offset_mapping"][0] == (0, 1)  # it has read two characters
    assert pairs(retokenize(inputs, student, characters())) == [(0, 1, 2)]


def test_only_positions_that_count_are_paired():
    student, teacher = byte_level(), word_pieces()
    inputs = batch(student, ["the cat is good"])
    every = pairs(retokenize(inputs, student, teacher))
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :3] = -100
    assert pairs(retokenize(inputs, student, teacher)) == [pair for pair in every if pair[1] >= 2] != every


def test_a_longer_limit_cuts_the_teachers_row_and_its_pairs():
    student, teacher = byte_level(), word_pieces()
    inputs = batch(student, ["the cat is good", "the dog"])
    every = pairs(retokenize(inputs, student, teacher))
    view = retokenize(inputs, student, teacher, max_length=3)
    assert view.inputs["input_ids"].shape == (2, 3)
    assert pairs(view) == [pair for pair in every if pair[2] < 3] != every


def test_sampled_tokens_that_no_text_encodes_to_use_what_is_proved():
    student, teacher = byte_level(), word_pieces()
    ids = [student.convert_tokens_to_ids(letter) for letter in "the"]  # encoding gives one token for it
    ids += student("\u00e9 cat is")["input_ids"]
    view = retokenize({"input_ids": torch.tensor([ids])}, student, characters())
    assert len(student("the\u00e9 cat is")["input_ids"]) < len(ids)
    read = [student.decode(ids[: s + 1]) for _, s, _ in pairs(view)]
    assert read == ["t", "th", "the", "the\u00e9", "the\u00e9 cat"]
    assert [t for _, _, t in pairs(view)] == [len(text) - 1 for text in read]
    assert len(pairs(retokenize({"input_ids": torch.tensor([ids])}, student, teacher))) > 1


def test_text_ends_before_bytes_that_are_no_character():
    student, teacher = byte_level(), characters()
    broken = student("\U0001f600")["input_ids"][:2]  # half of it: a text cut in the middle of a character
    ids = student("the cat")["input_ids"] + broken + student(" is")["input_ids"]
    view = retokenize({"input_ids": torch.tensor([ids])}, student, teacher)
    assert teacher.decode(view.inputs["input_ids"][0]) == "the cat"
    assert [student.decode(ids[: s + 1]) for _, s, _ in pairs(view)] == ["the", "the cat"]


def test_normalising_students_give_the_text_that_they_have_read():
    student, teacher = word_pieces(), byte_level()
    view = retokenize(batch(student, ["The CAT is"]), student, teacher)
    assert teacher.decode(view.inputs["input_ids"][0]) == "the cat is"
    ours = student.convert_ids_to_tokens(student("The CAT is")["input_ids"])
    assert [ours[s] for _, s, _ in pairs(view)] == ["the", "cat", "is"]


def test_slow_students_are_read_by_prefixes():
    class Slow:
        """A tokenizer that can't tell offsets."""

        is_fast = False

        def __init__(self, inner):
            self.inner = inner

        def __call__(self, *args, **kwargs):
            assert "return_offsets_mapping" not in kwargs
            return self.inner(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    student, teacher = byte_level(), word_pieces()
    inputs = batch(student, ["the cat is good"])
    assert pairs(retokenize(inputs, Slow(student), teacher)) == pairs(retokenize(inputs, student, teacher))


def test_special_tokens_in_mid_text_count_only_where_the_teacher_has_them():
    student = byte_level()
    student.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    inputs = batch(student, ["the cat<turn>is good"])
    without, having = word_pieces(), byte_level()
    view = retokenize(inputs, student, without)
    assert without.decode(view.inputs["input_ids"][0], skip_special_tokens=True) == "the cat"
    having.add_special_tokens({"additional_special_tokens": ["<pad>", "<turn>"]})
    turn = having.convert_tokens_to_ids("<turn>")
    view = retokenize(inputs, student, having)
    assert turn in view.inputs["input_ids"][0].tolist()
    assert turn != student.convert_tokens_to_ids("<turn>")
    assert [s for _, s, _ in pairs(view)] == list(range(inputs["input_ids"].shape[1] - 1))


def test_an_end_token_in_the_row_is_predicted_but_not_read():
    student, teacher = byte_level(), word_pieces()
    ids = [*student("the cat is")["input_ids"], student.eos_token_id]
    view = retokenize({"input_ids": torch.tensor([ids])}, student, teacher)
    assert pairs(view)[-1] == (0, len(ids) - 2, 3)  # both stand behind "is"
    assert student.eos_token not in teacher.decode(view.inputs["input_ids"][0])


def test_rows_without_text_have_no_pairs_and_a_harmless_teacher_row():
    student, teacher = byte_level(), byte_level()
    inputs = {"input_ids": torch.tensor([[student.eos_token_id] * 3])}
    view = retokenize(inputs, student, teacher)
    assert pairs(view) == []
    assert view.inputs["attention_mask"].tolist() == [[1]]
    logits = torch.randn(1, 3, 5, requires_grad=True)
    ours, theirs = view.pick(logits, torch.randn(1, 1, 7))
    assert ours.shape == (0, 5)
    assert theirs.shape == (0, 7)


def test_picked_logits_go_into_the_loss():
    from types import SimpleNamespace

    student, teacher = byte_level(), word_pieces()
    inputs = batch(student, ["the cat is good", "a sun"])
    view = retokenize(inputs, student, teacher)
    ours = torch.randn(*inputs["input_ids"].shape, len(student), requires_grad=True)
    theirs = torch.randn(*view.inputs["input_ids"].shape, len(teacher))
    picked = view.pick(ours, theirs)
    for i, (row, s, t) in enumerate(pairs(view)):
        assert torch.equal(picked[0][i], ours[row, s])
        assert torch.equal(picked[1][i], theirs[row, t])
    sides = [SimpleNamespace(logits=side) for side in picked]
    CrossTokenizerLoss()(*sides, head="causal_tokens").backward()
    touched = ours.grad.abs().sum(-1).nonzero().tolist()
    assert touched == [[row, s] for row, s, _ in pairs(view)]


def test_wrong_arguments():
    inputs = {"input_ids": torch.tensor([[1]])}
    with pytest.raises(SettingError, match="tokenizer object can't tell which characters its tokens cover"):
        retokenize(inputs, tiny.tokenizer(), object())
    with pytest.raises(SettingError, match="max_length must be a whole number from 1 on, got 0"):
        retokenize(inputs, tiny.tokenizer(), tiny.tokenizer(), max_length=0)
