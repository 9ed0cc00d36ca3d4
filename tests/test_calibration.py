"""Batches from every form of data, and statistics against slow loops."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch import nn

import tiny
from hfshrink.calibration import batches, collect
from hfshrink.errors import CheckpointError, SettingError

FFN = "bert.encoder.layer.0.intermediate.dense"
TEXTS = ["the dog is good", "a very old cat reads", "bad plot", "the sun was warm and the movie long", "no"]


@pytest.fixture
def rows() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0, 1, 0]})


@pytest.fixture
def network() -> nn.Module:
    return tiny.model("bert")


def module_inputs(network: nn.Module, name: str, given: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The inputs of a module in each batch, as they come."""
    seen: list[torch.Tensor] = []
    handle = network.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for batch in given:
        network(**batch)
    handle.remove()
    return seen


def has_hooks(network: nn.Module) -> bool:
    modules = any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())
    return modules or any(parameter._backward_hooks for parameter in network.parameters())


class TestBatches:
    def test_raw_rows(self, network: nn.Module, rows: datasets.Dataset) -> None:
        found = list(batches(rows, network, tiny.tokenizer(), batch_size=2))
        assert [len(batch["labels"]) for batch in found] == [2, 2, 1]
        assert sorted(found[0]) == ["attention_mask", "input_ids", "labels", "token_type_ids"]
        assert sum(batch["labels"].sum() for batch in found) == 2
        assert network(**found[0]).loss.isfinite()

    def test_columns_that_the_model_does_not_read(self, rows: datasets.Dataset) -> None:
        found = next(batches(rows, tiny.model("distilbert"), tiny.tokenizer()))
        assert sorted(found) == ["attention_mask", "input_ids", "labels"]

    def test_encoded_rows_and_a_folder(self, network: nn.Module, rows: datasets.Dataset, tmp_path: Path) -> None:
        encoded = rows.map(lambda row: tiny.tokenizer()(row["text"]))
        encoded.save_to_disk(tmp_path)
        from_rows, from_folder = (list(batches(form, network, batch_size=5)) for form in (encoded, str(tmp_path)))
        assert from_rows[0]["input_ids"].shape == (5, 10)
        assert torch.equal(from_rows[0]["input_ids"], from_folder[0]["input_ids"])

    def test_samples_are_spread(self, network: nn.Module) -> None:
        sorted_by_label = datasets.Dataset.from_dict({"input_ids": [[9]] * 10, "label": [0] * 5 + [1] * 5})
        [found] = batches(sorted_by_label, network, samples=4)
        assert sorted(found["labels"].tolist()) == [0, 0, 1, 1]

    def test_iterable(self, network: nn.Module) -> None:
        given = [tiny.inputs("bert") | {"name": "x"}, tiny.inputs("bert", seed=1)]
        found = list(batches(iter(given), network, samples=4))
        assert [len(batch["input_ids"]) for batch in found] == [3, 1]
        assert "name" not in found[0]
        assert len(list(batches(given, network, samples=3))) == 1

    def test_errors(self, network: nn.Module, rows: datasets.Dataset, tmp_path: Path) -> None:
        ids = {"input_ids": torch.ones(1, 2, dtype=torch.long)}
        for calibration, keywords, match in (
            (7, {}, "must be a datasets.Dataset, a Hub id, a folder or an iterable .* got int"),
            (ids, {}, r"got dict. A single batch goes into a list: \[batch\]"),
            ([], {}, "calibration data is empty: it has no batch"),
            (["text"], {}, "Batch 0 of the calibration data must be a dict of tensors, got str"),
            ([ids, {"input_ids": [1]}], {}, "Batch 1 .* got dict"),
            ([{"pixels": torch.ones(2)}], {}, "The model reads none of pixels; it reads attention_mask"),
            (rows.select([]), {}, "The data set is empty"),
            (rows, {}, "has raw columns .text, label. and the model no tokenizer"),
            (datasets.DatasetDict(train=rows), {}, "has the splits train; choose one"),
            (rows, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
            (rows, {"samples": 0}, "samples must be at least 1, got 0"),
        ):
            with pytest.raises(SettingError, match=match):
                list(batches(calibration, network, **keywords))
        with pytest.raises(CheckpointError, match="Can't read the data set"):
            list(batches(str(tmp_path), network))


class TestInputs:
    @pytest.mark.parametrize("side", ["right", "left"])
    def test_gram_is_the_slow_sum_without_padding(self, network: nn.Module, side: str) -> None:
        given = [tiny.inputs("bert"), tiny.inputs("bert", batch=2, length=5, seed=1)]
        if side == "left":
            given = [{name: tensor.flip(1) for name, tensor in batch.items()} for batch in given]
        expected, tokens = torch.zeros(16, 16, dtype=torch.float64), 0
        for x, batch in zip(module_inputs(network, FFN, given), given, strict=True):
            for row, mask in zip(x, batch["attention_mask"], strict=True):
                for vector, counts in zip(row.double(), mask, strict=True):
                    if counts:
                        expected += torch.outer(vector, vector)
                        tokens += 1
        with collect(network, "input_gram", include=FFN) as stats:
            for batch in given:
                network(**batch)
        assert list(stats) == [FFN]
        assert stats[FFN].tokens == tokens == 18 + 9
        assert stats[FFN].input_gram.dtype == torch.float64
        torch.testing.assert_close(stats[FFN].input_gram, expected, rtol=1e-12, atol=1e-12)
        with collect(network, "input_square", include=FFN) as squares:
            for batch in given:
                network(**batch)
        torch.testing.assert_close(squares[FFN].input_square, expected.diagonal(), rtol=1e-12, atol=1e-12)
        assert squares[FFN].input_gram is None

    def test_padding_content_does_not_matter(self, network: nn.Module) -> None:
        batch = tiny.inputs("bert")
        other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 9, batch["input_ids"])}
        found = []
        for given in (batch, other):
            with collect(network, "input_range", include="bert.encoder.*") as stats:
                network(**given)
            found.append(torch.tensor([stat.input_range for stat in stats.values()]))
        torch.testing.assert_close(*found)

    def test_range(self, network: nn.Module) -> None:
        given = [tiny.inputs("bert"), tiny.inputs("bert", seed=1)]
        seen = module_inputs(network, FFN, given)
        kept = torch.cat([x[b["attention_mask"] != 0] for x, b in zip(seen, given, strict=True)])
        with collect(network, "input_range", include=FFN) as stats:
            for batch in given:
                network(**batch)
        assert stats[FFN].input_range == (float(kept.min()), float(kept.max()))

    def test_absmax_and_histogram(self, network: nn.Module) -> None:
        given = [tiny.inputs("bert"), tiny.inputs("bert", seed=1)]
        seen = module_inputs(network, FFN, given)
        kept = torch.cat([x[b["attention_mask"] != 0] for x, b in zip(seen, given, strict=True)])
        found = {}
        for what in ("input_absmax", "input_histogram"):
            with collect(network, what, include=FFN) as stats:
                for batch in given:
                    network(**batch)
            found[what] = getattr(stats[FFN], what)
        assert torch.equal(found["input_absmax"], kept.abs().amax(dim=0))
        expected, _ = np.histogram(kept.double().numpy(), bins=found["input_histogram"].edges())
        assert found["input_histogram"].counts.tolist() == expected.tolist()
        assert (found["input_histogram"].low, found["input_histogram"].high) == (float(kept.min()), float(kept.max()))

    def test_masks_given_by_position_and_not_at_all(self, network: nn.Module) -> None:
        batch = tiny.inputs("bert")
        with collect(network, "input_gram", include=FFN) as stats:
            network(batch["input_ids"], batch["attention_mask"])
        assert stats[FFN].tokens == 18
        with collect(network, "input_gram", include=FFN) as stats:
            network(batch["input_ids"])
        assert stats[FFN].tokens == 21

    def test_inputs_without_a_sequence_count_in_full(self, network: nn.Module) -> None:
        with collect(network, "input_gram", include="*pooler.dense") as stats:
            network(**tiny.inputs("bert"))
        assert stats["bert.pooler.dense"].tokens == 3

    @pytest.mark.parametrize("family", tiny.CONFIGS)
    def test_families(self, family: str) -> None:
        network, batch = tiny.model(family), tiny.inputs(family)
        with collect(network, "input_gram") as stats:
            network(**batch)
        assert all(torch.equal(stat.input_gram, stat.input_gram.T) for stat in stats.values())
        positions = {"vit": 3 * 5, "resnet": 3}.get(family, 18)
        assert {stat.tokens for stat in stats.values()} <= {positions, 3}
        assert len(stats) >= (1 if family == "resnet" else 9)

    def test_encoder_decoder(self) -> None:
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = {"vocab_size": 30, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
        network = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
        mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
        with collect(network, "input_gram") as stats:
            network(input_ids=mask + 1, attention_mask=mask, decoder_input_ids=torch.ones(2, 4, dtype=torch.long))
        assert stats["encoder.block.0.layer.0.SelfAttention.q"].tokens == 4
        assert stats["decoder.block.0.layer.0.SelfAttention.q"].tokens == 8

    def test_convolutions_have_ranges(self) -> None:
        network = tiny.model("resnet")
        with collect(network, "input_range") as stats:
            network(**tiny.inputs("resnet"))
        pixels = tiny.inputs("resnet")["pixel_values"]
        first = next(iter(stats.values()))
        assert first.input_range == (float(pixels.min()), float(pixels.max()))

    def test_only_whole_calls_count(self, network: nn.Module) -> None:
        """Also where a call failed: its mask is forgotten."""
        batch = tiny.inputs("bert")
        with collect(network, "input_gram", include=FFN) as stats:
            with pytest.raises(IndexError):
                network(input_ids=torch.tensor([[10**6]]), attention_mask=torch.tensor([[1]]))
            network.bert(**batch)
            assert stats[FFN].tokens == 0
            network(**batch)
        assert stats[FFN].tokens == 18

    def test_modules_that_did_not_run(self, caplog: pytest.LogCaptureFixture) -> None:
        class Half(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.used(input=x)

        network = Half()
        with collect(network, "input_gram") as stats:
            network(torch.ones(1, 2))
        assert list(stats) == ["used"]
        assert "1 of 2 modules did not run: idle" in caplog.text


class TestGradients:
    def test_is_the_sum_of_squares_per_backward(self, network: nn.Module) -> None:
        given = [tiny.inputs("bert", seed=seed) | {"labels": torch.tensor([0, 1, 1])} for seed in range(3)]
        weight = network.get_submodule(FFN).weight
        expected = sum(torch.autograd.grad(network(**batch).loss, weight)[0] ** 2 for batch in given)
        for clears in (True, False):
            network.zero_grad()
            with collect(network, "squared_gradient", include=FFN) as stats:
                for batch in given:
                    network(**batch).loss.backward()
                    if clears:
                        network.zero_grad()
            torch.testing.assert_close(stats[FFN].squared_gradient, expected)
            assert stats[FFN].backwards == 3
            assert stats[FFN].squared_gradient.shape == weight.shape

    def test_a_layer_used_twice_has_one_gradient(self) -> None:
        layer = nn.Linear(2, 2)
        network = nn.Sequential(layer, layer)
        with collect(network, "squared_gradient") as stats:
            network(torch.ones(1, 2)).sum().backward()
        torch.testing.assert_close(stats["0"].squared_gradient, layer.weight.grad**2)
        assert stats["0"].backwards == 1

    def test_frozen(self, network: nn.Module) -> None:
        network.requires_grad_(False)
        with (
            pytest.raises(SettingError, match=r"query.weight gets no gradient: it is frozen"),
            collect(network, "squared_gradient"),
        ):
            pytest.fail("the block ran")
        assert not has_hooks(network)

    def test_not_finite(self, network: nn.Module) -> None:
        with (
            pytest.raises(SettingError, match=f"gradient of {FFN}.weight has NaN"),
            collect(network, "squared_gradient", include=FFN),
        ):
            (network(**tiny.inputs("bert")).logits.sum() * float("nan")).backward()


class TestBlock:
    @pytest.mark.parametrize("what", ["input_gram", "input_range", "squared_gradient"])
    def test_hooks_are_gone(self, network: nn.Module, what: str) -> None:
        with collect(network, what):
            assert has_hooks(network)
            network(**tiny.inputs("bert"), labels=torch.tensor([0, 1, 1])).loss.backward()
        assert not has_hooks(network)
        with pytest.raises(ZeroDivisionError), collect(network, what):
            raise ZeroDivisionError
        assert not has_hooks(network)

    def test_nothing_was_run(self, network: nn.Module) -> None:
        with (
            pytest.raises(SettingError, match=r"never called model\(\*\*batch\) for any of 14 modules"),
            collect(network, "input_gram"),
        ):
            pass
        with (
            pytest.raises(SettingError, match=r"never called loss.backward\(\)"),
            collect(network, "squared_gradient"),
        ):
            network(**tiny.inputs("bert"))

    def test_not_finite(self, network: nn.Module) -> None:
        network.bert.encoder.layer[0].attention.output.LayerNorm.weight.data[3] = float("inf")
        with (
            pytest.raises(SettingError, match=f"The input of {FFN} has NaN or infinite values"),
            collect(network, "input_gram"),
        ):
            network(**tiny.inputs("bert"))
        assert not has_hooks(network)

    def test_settings(self, network: nn.Module) -> None:
        for what, include, match in (
            ("gram", "*", "what must be one of input_gram, input_square, input_absmax, .*, got 'gram'"),
            ("input_gram", "nowhere*", "The wildcard 'nowhere.' matches none"),
        ):
            with pytest.raises(SettingError, match=match), collect(network, what, include):
                pytest.fail("the block ran")
        with (
            pytest.raises(SettingError, match="ReLU has no module that 'input_gram' can be collected for"),
            collect(nn.ReLU(), "input_gram"),
        ):
            pytest.fail("the block ran")
