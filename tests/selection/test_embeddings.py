"""Embeddings against one row at a time by hand, in the rows' order; cached by content, resumed, and refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value

import tiny
import training
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.selection import embeddings
from hfshrink.selection.embeddings import embed
from hfshrink.selection.pooling import Reader, pool

TEXTS = (
    *("a good film", "bad", "the very long story of a sad old dog", "no fish sings", "a green bird eats the red fish"),
    *("bright", "the plot was weak and the movie was slow", "new", "a happy cat", "the sun is warm"),
)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(embeddings, "CHUNK_ROWS", 4)


@pytest.fixture
def texts():
    return Dataset.from_dict({"text": list(TEXTS), "label": [i % 2 for i in range(len(TEXTS))]})


@pytest.fixture
def chunks(monkeypatch):
    """The row numbers of the chunks that are computed."""
    found, real = [], embeddings.Source.vectors

    def counted(source, numbers):
        found.append(numbers.tolist())
        return real(source, numbers)

    monkeypatch.setattr(embeddings.Source, "vectors", counted)
    return found


def slow(network, rows, reduce):
    """One row at a time, without padding."""
    found = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            found.append(reduce(network(input_ids=ids, attention_mask=torch.ones_like(ids))[0][0]).numpy())
    return np.stack(found)


def encoded():
    tokenizer = tiny.tokenizer()
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama", "gpt2"])
def test_means_of_texts_equal_slow_ones_in_the_rows_order(texts, family):
    """The head is not run; padding, batches and the order of lengths make no difference."""
    network, tokenizer = tiny.model(family, seed=1).train(), tiny.tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # GPT-2 would read token types as words
    found = embed(texts, network, tokenizer, batch_size=3)
    assert network.training, "the mode is the caller's"
    network.eval()
    assert found.dtype == np.float32
    assert found == pytest.approx(slow(network.base_model, encoded(), lambda state: state.mean(dim=0)), abs=1e-5)
    rows = Dataset.from_dict({"input_ids": encoded(), "labels": [0] * len(TEXTS)})
    assert embed(rows, network, batch_size=4) == pytest.approx(found, abs=1e-5)


def test_cls_is_the_first_token(texts):
    network = tiny.model("bert", seed=1)
    found = embed(texts, network, tiny.tokenizer(), pooling="cls", batch_size=3)
    assert found == pytest.approx(slow(network.base_model, encoded(), lambda state: state[0]), abs=1e-5)


def test_features_are_what_the_last_layer_reads(texts):
    """The classifier on them gives the model's logits: of BERT, of tokens on average, of Llama's last token."""
    for family, task in (("bert", None), ("bert", "token-classification"), ("llama", "text-classification")):
        network = tiny.model(family, task, seed=1, pad_token_id=0)
        found = torch.from_numpy(embed(texts, network, tiny.tokenizer(), pooling="features", batch_size=3))
        head = network.score if family == "llama" else network.classifier
        rows = [torch.tensor([row]) for row in encoded()]
        logits = [tiny.logits(network, {"input_ids": row, "attention_mask": torch.ones_like(row)})[0] for row in rows]
        expected = torch.stack([answer.mean(dim=0) if answer.ndim == 2 else answer for answer in logits])
        with torch.no_grad():
            assert torch.allclose(head(found), expected, atol=1e-4), family


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_images_take_the_features_of_their_classifier(family):
    network, pixels = tiny.model(family, seed=1), torch.randn(6, 3, 8, 8)
    rows = Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": [0, 1] * 3})
    found = torch.from_numpy(embed(rows, network, batch_size=4))
    head = network.classifier
    with torch.no_grad():
        assert torch.allclose(head(found), network(pixels).logits, atol=1e-4)
        state = network.base_model(pixels).last_hidden_state
    mean = embed(rows, network, pooling="mean", batch_size=4)
    assert mean == pytest.approx(
        (state.mean(dim=(2, 3)) if family == "resnet" else state.mean(dim=1)).numpy(), abs=1e-5
    )


def pictures(folder=None, count=5):
    """Images in the data set's own bytes, or as files."""
    from PIL import Image as Picture

    generator = np.random.default_rng(0)
    made = [Picture.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]
    if folder is not None:
        for number, picture in enumerate(made):
            picture.save(folder / f"{number}.png")
        made = [str(folder / f"{number}.png") for number in range(count)]
    return Dataset.from_dict(
        {"image": made, "label": [0] * count}, features=Features({"image": Image(), "label": Value("int64")})
    )


def image_processor():
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": 8, "width": 8}, do_resize=False)


def test_raw_images_go_through_the_processor(tmp_path, chunks):
    network, processor = tiny.model("vit", seed=1), image_processor()
    inside, files = pictures(), pictures(tmp_path)
    pixels = torch.from_numpy(np.stack([processor(row)["pixel_values"][0] for row in inside["image"]]))
    with torch.no_grad():
        expected = network.base_model(pixels).last_hidden_state[:, 0].numpy()
    for rows in (inside, files):
        found = embed(rows, network, processor, cache_dir=tmp_path / "cache")
        assert found == pytest.approx(expected, abs=1e-5)
    before = len(chunks)
    (tmp_path / "0.png").write_bytes((tmp_path / "1.png").read_bytes())  # the path is the same, the picture is not
    changed = embed(files, network, processor, cache_dir=tmp_path / "cache")
    assert len(chunks) > before
    assert changed[0] == pytest.approx(expected[1], abs=1e-5)


def test_words_and_pairs_are_read_as_such():
    network, tokenizer = tiny.model("bert", "token-classification", seed=1), tiny.tokenizer()
    words = Dataset.from_dict(
        {"tokens": [text.split() for text in TEXTS], "ner_tags": [[0] * len(t.split()) for t in TEXTS]}
    )
    as_text = Dataset.from_dict({"text": list(TEXTS)})
    assert embed(words, network, tokenizer) == pytest.approx(embed(as_text, network, tokenizer), abs=1e-6)
    pairs = Dataset.from_dict({"one": list(TEXTS), "tags": list(reversed(TEXTS)), "id": ["x"] * len(TEXTS)})
    found = embed(pairs, network, tokenizer, text_columns=["tags", "one"])
    ids = tokenizer(TEXTS[-1], TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        assert found[0] == pytest.approx(network.base_model(**ids)[0][0].mean(dim=0).numpy(), abs=1e-5)
    assert np.abs(found - embed(pairs, network, tokenizer, text_columns=["one", "tags"])).max() > 1e-3


def test_an_encoder_decoder_gives_its_encoders_mean(texts):
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=tiny.VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=34, pad_token_id=0,
    )  # fmt: skip
    network = BartForConditionalGeneration(config).eval()
    found = embed(texts, network, tiny.tokenizer(), batch_size=3)
    assert found == pytest.approx(slow(network.get_encoder(), encoded(), lambda state: state.mean(dim=0)), abs=1e-5)


def test_long_texts_are_cut(texts):
    network, tokenizer = tiny.model("bert", seed=1), tiny.tokenizer()
    cut = embed(texts, network, tokenizer, max_length=4)
    rows = Dataset.from_dict({"input_ids": [tokenizer(t, truncation=True, max_length=4)["input_ids"] for t in TEXTS]})
    assert cut == pytest.approx(embed(rows, network), abs=1e-5)


def test_pool_leaves_out_what_lies_on_padding():
    state = torch.tensor([[[1.0], [3.0], [torch.inf]]])
    assert pool(state, torch.tensor([[1, 1, 0]])).tolist() == [[2.0]]
    assert pool(state, how="cls").tolist() == [[1.0]]
    assert pool(torch.ones(2, 3, 4, 4)).shape == (2, 3)
    assert pool(torch.ones(2, 3).half()).dtype == torch.float32


def test_a_cached_answer_is_a_memory_map_found_by_content(texts, tmp_path, chunks):
    network = tiny.model("bert", seed=1)
    first = embed(texts, network, tiny.tokenizer(), cache_dir=tmp_path)
    assert isinstance(first, np.memmap)
    assert not first.flags.writeable
    assert len(chunks) == 3
    assert first == pytest.approx(embed(texts, network, tiny.tokenizer()), abs=1e-6)
    del chunks[:]
    again = Dataset.from_dict({"text": ["", *TEXTS], "label": [1] * 11}).select(range(1, 11))  # other labels and place
    tokenizer = tiny.tokenizer()
    tokenizer("truncation leaves a mark", truncation=True, max_length=3)
    assert np.array_equal(embed(again, network, tokenizer, cache_dir=tmp_path, batch_size=5), first)
    other_head = tiny.model("bert", seed=1)
    other_head.classifier.weight.data += 1
    assert np.array_equal(embed(texts, other_head, tiny.tokenizer(), cache_dir=tmp_path), first)
    assert not chunks, "nothing was computed"
    assert sorted(path.name for path in next(tmp_path.iterdir()).iterdir()) == [
        ".lock",
        "embeddings.json",
        "embeddings.npy",
    ]


@pytest.mark.parametrize("change", ["rows", "order", "weights", "pooling", "tokenizer", "length"])
def test_what_changes_the_vectors_is_computed_anew(texts, tmp_path, chunks, change):
    network, tokenizer, settings = tiny.model("bert", seed=1), tiny.tokenizer(), {}
    first = embed(texts, network, tokenizer, cache_dir=tmp_path)
    del chunks[:]
    if change == "rows":
        texts = Dataset.from_dict({"text": ["a bad film", *TEXTS[1:]]})
    elif change == "order":
        texts = texts.select(range(len(texts) - 1, -1, -1))
    elif change == "weights":
        network.bert.encoder.layer[0].output.dense.bias.data[0] += 1
    elif change == "tokenizer":
        tokenizer = tiny.tokenizer()
        tokenizer.truncation_side = "left"
    else:
        settings = {"pooling": {"pooling": "cls"}, "length": {"max_length": 30}}[change]
    second = embed(texts, network, tokenizer, cache_dir=tmp_path, **settings)
    assert len(chunks) == 3
    assert np.array_equal(first, embed(texts, network, tokenizer, cache_dir=tmp_path)) == (
        change in ("pooling", "length", "tokenizer")
    )
    assert second == pytest.approx(embed(texts, network, tokenizer, **settings), abs=1e-6)


def test_a_killed_run_goes_on_where_it_was(texts, tmp_path, monkeypatch, chunks):
    network, real = tiny.model("bert", seed=1), embeddings.Source.vectors

    def killed(source, numbers):
        if len(chunks) == 2:
            raise KeyboardInterrupt
        return real(source, numbers)

    with monkeypatch.context() as patch:
        patch.setattr(embeddings.Source, "vectors", killed)
        with pytest.raises(KeyboardInterrupt):
            embed(texts, network, tiny.tokenizer(), cache_dir=tmp_path)
    folder = next(tmp_path.iterdir())
    written = sorted(folder.glob("chunk-*.npy"))
    assert len(written) == 2
    written[1].write_bytes(written[1].read_bytes()[:-3])  # and the disk lost something
    (folder / ".chunk-000002.npy.aside-1").write_bytes(b"half")
    del chunks[:]
    found = embed(texts, network, tiny.tokenizer(), cache_dir=tmp_path)
    assert len(chunks) == 2
    assert found == pytest.approx(embed(texts, network, tiny.tokenizer()), abs=1e-6)
    assert not list(folder.glob("*chunk*"))


def test_a_corrupt_result_is_refused(texts, tmp_path):
    network = tiny.model("bert", seed=1)
    embed(texts, network, tiny.tokenizer(), cache_dir=tmp_path)
    path = next(tmp_path.rglob("embeddings.npy"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"embeddings.npy is truncated or corrupt. Delete it"):
        embed(texts, network, tiny.tokenizer(), cache_dir=tmp_path)


def test_a_file_in_the_place_of_the_cache_is_named(texts, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(CheckpointError, match="Choose another cache_dir"):
        embed(texts, tiny.model("bert"), tiny.tokenizer(), cache_dir=tmp_path / "cache")


def test_nothing_is_left_beside_a_data_set_on_disk(texts, tmp_path):
    texts.save_to_disk(tmp_path / "rows")
    before = sorted((tmp_path / "rows").iterdir())
    embed(tmp_path / "rows", tiny.model("bert"), tiny.tokenizer())
    assert sorted((tmp_path / "rows").iterdir()) == before


def test_rows_that_are_nan_are_named(texts):
    network = tiny.model("bert", seed=1)
    network.bert.embeddings.word_embeddings.weight.data[tiny.tokenizer().convert_tokens_to_ids("sings")] = torch.nan
    with pytest.raises(SettingError, match=r"embedding of row 3 is NaN or infinite \(1 of these 4 rows\)"):
        embed(texts, network, tiny.tokenizer())


def test_rows_without_tokens_or_text_are_named(texts):
    network = tiny.model("bert")
    empty = Dataset.from_dict(
        {"input_ids": [[5], [6, 7], [], [8]]}, features=Features({"input_ids": List(Value("int64"))})
    )
    with pytest.raises(SettingError, match="Row 2 has no tokens"):
        embed(empty, network)
    missing = Dataset.from_dict({"text": [*TEXTS[:3], None]})
    with pytest.raises(SettingError, match="Row 3 has None in the column 'text'"):
        embed(missing, network, tiny.tokenizer())
    long = Dataset.from_dict({"input_ids": [[5], [6] * 40, [7]]})
    with pytest.raises(SettingError, match="Row 1 has 40 tokens, but the model reads at most 34"):
        embed(long, network)


def test_what_a_model_can_not_give_is_refused(texts):
    bare = tiny.model("bert", "feature-extraction")
    with pytest.raises(UnsupportedModelError, match="BertModel has no head"):
        embed(texts, bare, tiny.tokenizer(), pooling="features")
    with pytest.raises(UnsupportedModelError, match="first token of a causal model knows no other"):
        embed(texts, tiny.model("llama"), tiny.tokenizer(), pooling="cls")
    images = Dataset.from_dict({"pixel_values": np.zeros((2, 3, 8, 8))})
    with pytest.raises(UnsupportedModelError, match="no first token"):
        embed(images, tiny.model("resnet"), pooling="cls")
    with pytest.raises(SettingError, match="no column of images among text, label"):
        embed(texts, tiny.model("resnet"), image_processor())
    with pytest.raises(SettingError, match="The model reads none of pixel_values; it reads"):
        embed(images, bare)
    assert Reader.of(bare, "auto").pooling == "mean"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of auto, mean, cls, features, got 'max'"),
        ({"batch_size": 0}, "batch_size must be a whole number from 1 on, got 0"),
        ({"max_length": True}, "max_length must be a whole number"),
        ({"text_columns": ["title"]}, "text_columns must be one or two of"),
        ({"processor": None}, "no tokenizer or processor beside it"),
    ],
)
def test_bad_settings_are_named(texts, settings, message):
    given = {"processor": tiny.tokenizer(), **settings}
    with pytest.raises(SettingError, match=message):
        embed(texts, tiny.model("bert"), given.pop("processor"), **given)


def test_streams_and_empty_sets_are_refused(texts):
    with pytest.raises(SettingError, match="got a streaming one"):
        embed(texts.to_iterable_dataset(), tiny.model("bert"), tiny.tokenizer())
    with pytest.raises(SettingError, match="has no rows"):
        embed(texts.select([]), tiny.model("bert"), tiny.tokenizer())


@pytest.mark.slow
def test_two_processes_embed_as_one_does(tmp_path):
    found = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        training.launch(Path(__file__).with_name("embed_run.py"), processes, folder)
        for rank in range(processes):
            found[processes, rank] = dict(np.load(folder / f"found-{rank}.npz"))
    for answers in found.values():
        for name, vectors in answers.items():
            assert vectors == pytest.approx(found[1, 0][name], abs=1e-6), name
    assert found[1, 0]["few"] == pytest.approx(found[1, 0]["plain"][[4, 2]], abs=1e-5)
