"""Static int8: ranges are those given or measured, to the last bit; errors say what is missing."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset

import tiny
from hfshrink.errors import SettingError
from hfshrink.modules import head_names
from hfshrink.quantization.graphs import static
from hfshrink.quantization.graphs.nodes import module_of
from hfshrink.quantization.graphs.static import apply_ranges, make_static
from hfshrink.quantization.ranges import affine_scale

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("one_export")
HEAD = ["classifier"]
ATTENTION = "bert.encoder.layer.0.attention.self"


@pytest.fixture(scope="module")
def bert():
    return tiny.model("bert")


@pytest.fixture(scope="module")
def exported(bert, one_export):
    return one_export(bert, tiny.tokenizer())


@pytest.fixture(scope="module")
def feed():
    found = [tiny.inputs("bert", batch=8, length=16, seed=seed) for seed in range(3)]
    return [{**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])} for batch in found]


@pytest.fixture(scope="module")
def made(bert, feed, one_export):
    state = copy.deepcopy(bert.state_dict())
    found = make_static(bert, tiny.tokenizer(), HEAD, calibration=feed)
    assert all(torch.equal(value, state[name]) for name, value in bert.state_dict().items())
    return found


def activation_grids(exported):
    """Module -> (scale, zero point) of what its node reads."""
    found = {}
    for node in exported.program.graph:
        maker = node.inputs[0].producer() if node.op_type in ("MatMul", "Conv") else None
        if maker is not None and maker.op_type == "DequantizeLinear":
            scale, zero_point = (maker.inputs[index].const_value.numpy() for index in (1, 2))
            assert zero_point.dtype == np.uint8
            found[module_of(node)] = (float(scale), int(zero_point))
    return found


def weight_of(exported, module):
    """Codes and scale of a module's int8 weight."""
    for node in exported.program.graph:
        if node.op_type in ("MatMul", "Conv") and module_of(node) == module:
            maker = node.inputs[1].producer()
            return maker.inputs[0].const_value.numpy(), maker.inputs[1].const_value.numpy()
    raise AssertionError(module)


class TestCalibrated:
    def test_it_is_close_to_the_model(self, bert, made, feed):
        expected = tiny.logits(bert, feed[0])
        error = (made[0](**feed[0]).logits - expected).abs().max()
        assert 0 < error < 0.05 * expected.abs().max()

    def test_all_linears_and_embeddings_but_the_head(self, bert, made):
        kinds = (torch.nn.Linear, torch.nn.Embedding)
        expected = {name for name, module in bert.named_modules() if isinstance(module, kinds)} - set(HEAD)
        assert set(made[1]) == expected
        assert not any(module_of(node) == "classifier" for node in made[0].program.graph if node.op_type == "MatMul")

    def test_record(self, made):
        results = made[2]
        assert results["samples"] == 24
        assert results["fused"] == {"attention": 2, "norms": 5}
        assert results["ranges"].keys() == activation_grids(made[0]).keys()
        grids = activation_grids(made[0])
        assert all(grids[name] == affine_scale(*bounds) for name, bounds in results["ranges"].items())

    def test_no_large_float_constant_is_left(self, made):
        constants = [value.const_value for value in made[0].program.graph.initializers.values()]
        assert max(c.size for c in constants if c.numpy().dtype == np.float32) <= 3 * 16

    def test_methods_by_wildcard(self, bert, feed, made):
        ranges = {"*.output.dense": "min-max", "*": "percentile"}
        found = make_static(bert, tiny.tokenizer(), HEAD, calibration=feed, ranges=ranges)[2]["ranges"]
        changed = {name for name, bounds in found.items() if bounds != made[2]["ranges"][name]}
        assert changed
        assert all(name.endswith(".output.dense") for name in changed)

    def test_one_scale_per_weight(self, bert, feed):
        found, _, _ = make_static(bert, tiny.tokenizer(), HEAD, calibration=iter(feed), samples=8, per_channel=False)
        codes, scale = weight_of(found, f"{ATTENTION}.query")
        assert scale.shape == ()
        assert np.abs(codes).max() == 127

    def test_seven_bits_where_eight_can_overflow(self, bert, feed, monkeypatch):
        monkeypatch.setattr(static, "supports_vnni", lambda: False)
        found, _, results = make_static(bert, tiny.tokenizer(), HEAD, calibration=feed[:1])
        codes, _ = weight_of(found, f"{ATTENTION}.query")
        assert np.abs(codes).max() == 63
        assert results["reduce_range"]
        expected = tiny.logits(bert, feed[0])
        assert (found(**feed[0]).logits - expected).abs().max() < 0.1 * expected.abs().max()

    @pytest.mark.parametrize("family", ["gpt2", "vit"])
    def test_other_families(self, family):
        model = tiny.model(family)
        batch = tiny.inputs(family)
        if family == "gpt2":
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        found, changed, _ = make_static(model, None, head_names(model), calibration=[batch], ranges="mse")
        expected = tiny.logits(model, batch)
        difference = (found(**batch).logits - expected).abs()
        if family == "gpt2":
            difference = difference[batch["attention_mask"] != 0]
        assert 0 < difference.max() < 0.08 * expected.abs().max()
        assert len(changed) >= 8

    def test_learned_ranges_need_no_data(self, bert, made):
        learned = {name: tuple(bounds) for name, bounds in made[2]["ranges"].items()}
        found = make_static(bert, tiny.tokenizer(), HEAD, learned_ranges=learned)
        assert activation_grids(found[0]) == activation_grids(made[0])
        assert found[2]["samples"] == 0
        learned.popitem()
        with pytest.raises(SettingError, match="takes its ranges from data"):
            make_static(bert, tiny.tokenizer(), HEAD, learned_ranges=learned)


@pytest.fixture(scope="module")
def resnet():
    return tiny.model("resnet")


@pytest.fixture(scope="module")
def images():
    return [{"pixel_values": torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))}]


class TestConvolutions:
    def test_codes_from_the_first_convolution_to_the_pool(self, resnet, images):
        found, changed, _ = make_static(resnet, None, ["classifier.1"], calibration=images)
        expected = tiny.logits(resnet, images[0])
        assert (found(**images[0]).logits - expected).abs().max() < 0.05 * expected.abs().max()
        convolutions = {name for name, module in resnet.named_modules() if isinstance(module, torch.nn.Conv2d)}
        assert set(changed) == convolutions  # though the graph names them after the norms that it merged
        for node in found.program.graph:
            if node.op_type in ("Conv", "Add", "MaxPool"):
                readers = {reader.op_type for reader, _ in node.outputs[0].uses()}
                assert readers in ({"QuantizeLinear"}, {"Relu"})

    def test_a_convolution_is_kept_by_its_name(self, resnet, images):
        kept = "resnet.embedder.embedder.convolution"
        found, changed, _ = make_static(resnet, None, ["classifier.1", kept], calibration=images)
        assert kept not in changed
        [first] = [node for node in found.program.graph if node.op_type == "Conv" and module_of(node) == kept]
        assert first.inputs[1].const_value.numpy().dtype == np.float32

    def test_images_of_another_size(self, resnet):
        with pytest.raises(SettingError, match=r"does not fit the graph \(pixel_values \(3, 3, 8, 8\)\)"):
            make_static(resnet, None, [], calibration=[tiny.inputs("resnet")])


class TestApplyRanges:
    def test_grids_are_exactly_those_of_the_ranges(self, exported):
        """Also where query, key and value read one tensor."""
        ranges = {
            f"{ATTENTION}.{name}": (-1.0 - part, 2.0 * part) for part, name in enumerate(("query", "key", "value"))
        }
        before = len(exported.program.graph)
        found, changed = apply_ranges(exported, ranges, None, HEAD)
        assert len(exported.program.graph) == before
        assert activation_grids(found) == {name: affine_scale(*bounds) for name, bounds in ranges.items()}
        assert set(ranges) < set(changed)

    def test_it_equals_fake_quantization(self, bert, exported, feed):
        """PyTorch with rounded weights and inputs gives the same logits."""
        name = "bert.encoder.layer.1.intermediate.dense"
        low, high = -2.0, 2.5
        fake = copy.deepcopy(bert)
        weight = fake.get_submodule(name).weight.data
        weight_scale = weight.abs().amax(dim=1) / 100
        weight.copy_((weight / weight_scale[:, None]).round() * weight_scale[:, None])
        scale, zero_point = affine_scale(low, high)
        fake.get_submodule(name).register_forward_pre_hook(
            lambda _, args: (((args[0] / scale).round() + zero_point).clamp(0, 255).sub(zero_point) * scale,)
        )
        tables = [n for n, module in bert.named_modules() if isinstance(module, torch.nn.Embedding)]
        found, changed = apply_ranges(exported, {name: (low, high)}, {name: weight_scale}, tables)
        assert changed == [name]
        assert torch.equal(torch.tensor(weight_of(found, name)[1]), weight_scale)
        assert torch.allclose(found(**feed[0]).logits, tiny.logits(fake, feed[0]), atol=1e-4)

    @pytest.mark.parametrize(
        ("ranges", "scales", "message"),
        [
            ({}, None, "No node was quantized: ranges names no module"),
            ({"nothing": (0, 1)}, None, "no node with a weight of nothing; it has bert"),
            ({"bert.pooler.dense": (0, float("nan"))}, None, "range of the input of bert.pooler.dense must be finite"),
            (
                {"bert.pooler.dense": (0, 1)},
                {"bert.pooler.dense": torch.ones(3)},
                r"shape \(\) or \(16,\), got \(3,\)",
            ),
            ({"bert.pooler.dense": (0, 1)}, {"bert.pooler.dense": torch.zeros(16)}, "must be above 0 and finite"),
        ],
    )
    def test_errors(self, exported, ranges, scales, message):
        with pytest.raises(SettingError, match=message):
            apply_ranges(exported, ranges, scales, HEAD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "takes its ranges from data: give calibration="),
        ({"smooth": 1.5, "calibration": []}, r"smooth must be in \[0, 1\] or None, got 1.5"),
        ({"calibration": []}, "calibration data is empty"),
        ({"calibration": [{"pixels": torch.ones(2)}]}, "reads none of pixels"),
        ({"calibration": Dataset.from_dict({"input_ids": [[9]]}), "samples": 0}, "samples must be at least 1, got 0"),
        ({"calibration": [], "ranges": "max"}, "ranges must be one of min-max, .* got 'max'"),
        ({"learned_ranges": {"nothing": (0, 1)}}, "no node with a weight of nothing"),
    ],
)
def test_bad_settings(bert, options, message):
    with pytest.raises(SettingError, match=message):
        make_static(bert, tiny.tokenizer(), HEAD, **options)


def test_nothing_left_to_quantize(bert, feed):
    everything = [name for name, module in bert.named_modules() if isinstance(module, torch.nn.Linear)]
    with pytest.raises(SettingError, match="There is nothing to quantize: no MatMul, Gemm or Conv"):
        make_static(bert, tiny.tokenizer(), everything, calibration=feed)
