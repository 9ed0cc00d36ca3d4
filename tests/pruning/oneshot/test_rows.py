"""What `prune` asks about its calibration data: a loss, the length of its rows, a plain module's example."""

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import tiny
from hfshrink import prune, report
from hfshrink.data import data_title
from hfshrink.errors import SettingError
from hfshrink.pruning.oneshot.rows import example_of, has_loss, mean_length


def test_a_loss_is_found_where_there_are_labels():
    batch = tiny.inputs("bert")
    assert not has_loss(tiny.model("bert"), batch)
    assert has_loss(tiny.model("bert"), batch | {"labels": torch.tensor([0, 1, 1])})


def test_lengths_leave_padding_out():
    assert mean_length(tiny.model("bert"), [tiny.inputs("bert")]) == 6  # 7, 6 and 5
    assert mean_length(tiny.model("vit"), [tiny.inputs("vit")]) == 5  # 4 patches and [CLS]


def test_titles_name_no_folder_of_the_machine(tmp_path):
    assert data_title(str(tmp_path / "reviews")) == "reviews"
    assert data_title(tmp_path) == tmp_path.name
    assert data_title("stanfordnlp/imdb") == "stanfordnlp/imdb"
    assert data_title([1]) == "list"


def test_a_plain_module_is_shown_one_batch():
    image = torch.zeros(1, 3, 4, 4)
    assert example_of(nn.Linear(1, 1), iter([image, None]))["inputs"] is image
    assert example_of(nn.Linear(1, 1), image)["inputs"] is image
    assert example_of(tiny.model("bert"), None) == {}
    with pytest.raises(SettingError, match="Linear is no model of transformers"):
        example_of(nn.Linear(1, 1), None)


@pytest.mark.parametrize("method", ["wanda", "taylor"])
def test_an_encoder_decoder_needs_its_targets(method):
    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    batch = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3).long()}
    with pytest.raises(SettingError, match="is an encoder-decoder.*labels or decoder_input_ids"):
        prune(model, 0.5, method=method, calibration=[batch])
    prune(model, 0.5, method=method, calibration=[batch | {"labels": torch.tensor([[6, 7]])}])
    assert report(model).steps[-1].results["sparsity"] == pytest.approx(0.5, abs=0.02)
