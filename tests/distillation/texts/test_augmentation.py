"""New texts differ from their originals in likely words only, and say that they have no label."""

import random

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

import tiny
from hfshrink.distillation.texts.augmentation import augment, candidate_words
from hfshrink.distillation.texts.masked_words import find_slots, read_masked_words, replace_words, whole_words
from hfshrink.errors import SettingError, UnsupportedModelError

RANKED = ("good", "fine", "great", "happy", "bright")  # what the hand-made model predicts everywhere, best first
TEXTS = ["the cat eats a fish", "a very long, boring movie!", "the bird sings", "no sun"]


def masked_lm(**settings):
    return tiny.model("bert", "fill-mask", **settings)


def knowing(ranked=RANKED):
    """A masked language model that predicts these words everywhere, in this order."""
    model, vocabulary = masked_lm(), tiny.tokenizer().get_vocab()
    with torch.no_grad():
        for rank, word in enumerate(ranked):
            model.cls.predictions.bias[vocabulary[word]] = 1000.0 * (len(ranked) - rank)
    return model


def rows(**columns):
    return Dataset.from_dict({"text": TEXTS, **columns})


def wordpieces(*pieces):
    """A fast tokenizer of BERT's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", *pieces)
    made = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", model_max_length=32
    )


def byte_pairs(*merged):
    """A fast tokenizer of GPT-2's and RoBERTa's kind that knows single letters and the given words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = []
    for word in merged:
        for end in range(2, len(word) + 1):
            if (pair := (word[: end - 1], word[end - 1])) not in merges:
                merges.append(pair)
                tokens.append(word[:end])
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(tokens)}, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", mask_token="<mask>", model_max_length=32)


def test_words_come_from_the_models_best_candidates():
    found = augment(rows(), knowing(), tiny.tokenizer(), copies=5, replace=1.0, candidates=2)
    new = found["text"][len(TEXTS) :]
    assert found["text"][: len(TEXTS)] == TEXTS
    assert {word for text in new for word in text.replace(",", "").replace("!", "").split()} == {"good", "fine"}


def test_punctuation_and_spaces_stay():
    dataset = Dataset.from_dict({"text": ["A  very (long), boring movie!"]})
    new = augment(dataset, knowing(), tiny.tokenizer(), copies=1, replace=1.0, candidates=1)["text"][1]
    assert new == "A  good (good), good good!"  # the tokenizer does not know the capital A


def test_candidates_are_the_slow_loops():
    model, tokenizer = masked_lm(), tiny.tokenizer()
    words = read_masked_words(model, tokenizer)
    found = candidate_words(words, TEXTS, 4, batch_size=3)
    for text, slots in zip(TEXTS, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        for slot, chosen in slots:
            masked = ids.clone()
            masked[0, slot.position] = tokenizer.mask_token_id
            logits = tiny.logits(model, {"input_ids": masked})[0, slot.position].tolist()
            order = sorted(range(len(tiny.SPECIAL), tiny.VOCABULARY), key=lambda number: -logits[number])
            expected = [tokenizer.decode([n]) for n in order if tokenizer.decode([n]) != text[slot.start : slot.end]]
            assert chosen == expected[:4]


def test_a_word_is_never_its_own_candidate():
    words = read_masked_words(knowing(("cat", "fish", "a")), tiny.tokenizer())
    [slots] = candidate_words(words, [TEXTS[0]], 2)
    by_word = {TEXTS[0][slot.start : slot.end]: chosen for slot, chosen in slots}
    assert by_word == {
        "the": ["cat", "fish"],
        "cat": ["fish", "a"],
        "eats": ["cat", "fish"],
        "a": ["cat", "fish"],
        "fish": ["cat", "a"],
    }


def test_a_word_in_other_letter_case_is_no_candidate():
    tokenizer = wordpieces("Good", "good", "GOOD", "film", "bad")
    words = read_masked_words(masked_lm(vocab_size=len(tokenizer)), tokenizer)
    [slots] = candidate_words(words, ["Good film"], 9)
    assert [sorted(chosen) for _, chosen in slots] == [["a", "bad", "film"], ["GOOD", "Good", "a", "bad", "good"]]


def test_a_small_vocabulary_gives_all_other_words():
    words = read_masked_words(masked_lm(), tiny.tokenizer())
    [slots] = candidate_words(words, ["cat"], 10_000)
    assert sorted(slots[0][1]) == sorted(set(tiny.WORDS) - {"cat"})


def test_share_of_replaced_words_is_replace():
    text = " ".join(random.Random(0).choices(("cat", "dog", "bird", "fish"), k=25))
    found = augment(Dataset.from_dict({"text": [text]}), knowing(), tiny.tokenizer(), copies=200, replace=0.3)
    pairs = [pair for new in found["text"][1:] for pair in zip(new.split(), text.split(), strict=True)]
    assert sum(new != old for new, old in pairs) / len(pairs) == pytest.approx(0.3, abs=0.02)  # 5000 words


def test_rows_are_new_and_different():
    found = augment(rows(), knowing(), tiny.tokenizer(), copies=30, candidates=2)["text"]
    assert len(set(found)) == len(found)
    assert len(TEXTS) < len(found) < len(TEXTS) * 31


def test_original_rows_that_repeat_stay():
    dataset = Dataset.from_dict({"text": ["no sun", "no sun"]})
    found = augment(dataset, knowing(), tiny.tokenizer(), copies=3, replace=1.0, candidates=1)["text"]
    assert found == ["no sun", "no sun", "good good"]


def test_same_seed_same_rows_and_the_random_state_stays():
    before = torch.random.get_rng_state(), random.getstate()
    first, again, other = (augment(rows(), masked_lm(), tiny.tokenizer(), copies=3, seed=s)["text"] for s in (1, 1, 2))
    assert first == again != other
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()


def test_batch_size_changes_nothing():
    one, many = (augment(rows(), masked_lm(), tiny.tokenizer(), copies=2, batch_size=b)["text"] for b in (1, 64))
    assert one == many


def test_the_model_stays_in_its_mode():
    model = masked_lm().train()
    first = augment(rows(), model, tiny.tokenizer(), copies=2)["text"]
    assert all(module.training for module in model.modules())
    assert first == augment(rows(), model.eval(), tiny.tokenizer(), copies=2)["text"]  # no dropout


def test_both_texts_of_a_pair_change_and_other_columns_are_copied():
    dataset = Dataset.from_dict({"first": ["a cat"], "second": ["the dog"], "label": [1], "number": [7]})
    found = augment(dataset, knowing(), tiny.tokenizer(), copies=2, replace=1.0, candidates=1)
    assert found.column_names == ["first", "second", "label", "number"]
    assert found[:] == {
        "first": ["a cat", "good good"],
        "second": ["the dog", "good good"],
        "label": [1, -100],
        "number": [7, 7],
    }


def test_one_named_column_of_two_changes():
    dataset = Dataset.from_dict({"first": ["a cat"], "second": ["the dog"]})
    found = augment(dataset, knowing(), tiny.tokenizer(), copies=1, replace=1.0, candidates=1, text_columns=["second"])
    assert found[1] == {"first": "a cat", "second": "good good"}


@pytest.mark.parametrize(
    ("values", "feature", "expected"),
    [
        ([0, 1, 0, 1], ClassLabel(names=["no", "yes"]), ClassLabel(names=["no", "yes"])),
        ([0, 1, 0, 1], Value("int64"), Value("int64")),
        ([0, 1, 0, 1], Value("uint8"), Value("int64")),
        ([False, True, False, True], Value("bool"), Value("int64")),
        (["no", "yes", "no", "yes"], Value("string"), ClassLabel(names=["no", "yes"])),
    ],
)
def test_new_rows_have_no_label(values, feature, expected, tmp_path):
    features = Features({"text": Value("string"), "label": feature})
    dataset = Dataset.from_dict({"text": TEXTS, "label": values}, features=features)
    found = augment(dataset, knowing(), tiny.tokenizer(), copies=1, replace=1.0)
    assert found.features["label"] == expected
    assert found["label"][:] == [0, 1, 0, 1, -100, -100, -100, -100]
    found.shuffle(seed=0).save_to_disk(tmp_path / "rows")
    again = Dataset.load_from_disk(tmp_path / "rows").map(lambda row: {"length": len(row["text"])})
    assert sorted(again["label"])[:4] == [-100] * 4


def test_rows_without_label_pass_the_encoding():
    from hfshrink.data import encode

    model = tiny.model("bert", id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    dataset = rows(label=[0, 1, 0, 1]).cast_column("label", ClassLabel(names=["no", "yes"]))
    found = augment(dataset, knowing(), tiny.tokenizer(), copies=1, replace=1.0)
    encoded = encode(found, model, tiny.tokenizer(), "text-classification")
    assert encoded["labels"][:] == [1, 0, 1, 0, -100, -100, -100, -100]  # put in the model's order by name


def test_labels_are_kept_where_asked():
    dataset = rows(label=[0.5, 1.0, 1.5, 2.0])
    found = augment(dataset, knowing(), tiny.tokenizer(), copies=1, replace=1.0, keep_labels=True)
    assert found["label"][:] == [0.5, 1.0, 1.5, 2.0] * 2


@pytest.mark.parametrize("labels", [[0.5, 1.0, 1.5, 2.0], [[0, 1]] * 4])
def test_labels_that_cannot_miss_are_refused(labels):
    with pytest.raises(SettingError, match=r"column 'label' of .* can't hold -100 .* keep_labels=True"):
        augment(rows(label=labels), knowing(), tiny.tokenizer())


def test_pieces_of_words_are_no_candidates_and_are_not_replaced():
    tokenizer = wordpieces("cat", "dog", "un", "##cat", "##s", "!", "7")
    assert list(whole_words(tokenizer).values()) == ["a", "cat", "dog", "un"]
    words = read_masked_words(masked_lm(), tokenizer)
    text = "a uncat cat! cats 7 dog's zebra"
    _, [slots] = find_slots(words, [text])
    assert [text[slot.start : slot.end] for slot in slots] == ["a", "cat"]


def test_byte_level_words_begin_with_a_space():
    tokenizer = byte_pairs("Ġcat", "Ġdog", "ing")
    found = set(whole_words(tokenizer).values())
    assert {"cat", "dog", "ca"} <= found
    assert not {"ing", "in"} & found
    words = read_masked_words(masked_lm(vocab_size=len(tokenizer)), tokenizer)
    text = "the cat, dogs or dog"
    _, [slots] = find_slots(words, [text])
    assert [text[slot.start : slot.end] for slot in slots] == ["cat", "dog"]
    assert replace_words(text, [(slots[0], "dog"), (slots[1], "cat")]) == "the dog, dogs or cat"


def test_sentencepiece_words_begin_with_a_mark():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ("<unk>", "<mask>", "▁a", "▁cat", "▁dog", "s", "▁", "dog", ".")
    made = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", mask_token="<mask>", model_max_length=32
    )
    assert list(whole_words(tokenizer).values()) == ["a", "cat", "dog"]
    text = "cat dogs dog."
    _, [slots] = find_slots(read_masked_words(masked_lm(), tokenizer), [text])
    assert [text[slot.start : slot.end] for slot in slots] == ["cat"]


def test_words_beyond_the_models_reach_stay():
    text = " ".join(["cat"] * 40)
    new = augment(Dataset.from_dict({"text": [text]}), knowing(), tiny.tokenizer(), copies=1, replace=1.0)["text"][1]
    assert new.split()[30:] == ["cat"] * 10  # 32 tokens, two of them special
    assert "cat" not in new.split()[:30]


def test_roberta_and_a_folder_work(tmp_path):
    tiny.model("roberta", "fill-mask").save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert len(augment(rows(), tmp_path, copies=1, replace=1.0)) == 8


def test_texts_that_cannot_change_are_told(caplog):
    dataset = Dataset.from_dict({"text": ["zebra"], "label": ["yes"]})
    found = augment(dataset, knowing(), tiny.tokenizer())
    assert found["text"][:] == ["zebra"]
    assert "No text was changed" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"copies": 0}, "copies must be a whole number from 1 on, got 0"),
        ({"candidates": 1.5}, "candidates must be a whole number from 1 on, got 1.5"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"replace": 0.0}, "replace must be a number above 0 and at most 1, got 0.0"),
        ({"replace": 1.1}, "replace must be a number above 0 and at most 1, got 1.1"),
        ({"replace": float("nan")}, "replace must be a number above 0 and at most 1, got nan"),
        ({"text_columns": ["body"]}, "text_columns must be one or two of text"),
    ],
)
def test_bad_numbers_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        augment(rows(), knowing(), tiny.tokenizer(), **settings)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a cat", " "]}, "column 'text' has an empty text in row 1"),
        ({"text": ["a cat", None]}, "column 'text' must hold text, got None"),
        ({"number": [1, 2]}, "Found 0 columns of text"),
        ({"text": ["a cat"], "input_ids": [[1, 2]]}, "has the column 'input_ids', which belongs to the old texts"),
        ({"text": ["a cat"], "teacher_logits": [[1.0]]}, "has the column 'teacher_logits', which belongs to the old"),
    ],
)
def test_bad_rows_are_refused(columns, message):
    with pytest.raises(SettingError, match=message):
        augment(Dataset.from_dict(columns), knowing(), tiny.tokenizer())


def test_models_that_fill_no_mask_are_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="Expected a masked language model .* for text-classification"):
        augment(rows(), tiny.model("bert"), tiny.tokenizer())
    tiny.model("bert").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="Expected a masked language model .* for text-classification"):
        augment(rows(), tmp_path, tiny.tokenizer())  # and no random head is made


def test_tokenizers_that_do_not_fit_are_refused():
    with pytest.raises(SettingError, match="no tokenizer beside the masked language model"):
        augment(rows(), knowing())
    unmasked = tiny.tokenizer()
    unmasked.mask_token = None
    with pytest.raises(SettingError, match="has no mask token"):
        augment(rows(), knowing(), unmasked)
    with pytest.raises(SettingError, match=f"tokenizer has {tiny.VOCABULARY} entries, .* predicts 30: not a pair"):
        augment(rows(), masked_lm(vocab_size=30), tiny.tokenizer())


def test_broken_weights_are_named():
    model = masked_lm()
    model.cls.predictions.bias.data[7] = float("nan")
    with pytest.raises(SettingError, match="masked language model's logits hold NaN"):
        augment(rows(), model, tiny.tokenizer())
