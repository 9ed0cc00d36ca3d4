"""Bias correction: the mean error is that of a slow recomputation, and smaller afterwards."""

import numpy as np
import pytest
import torch

import tiny
from hfshrink.quantization.graphs.calibrating import open_session
from hfshrink.quantization.graphs.correction import correct_biases, mean_errors
from hfshrink.quantization.graphs.static import make_static
from hfshrink.quantization.graphs.targets import find_targets, split_gemms
from hfshrink.quantization.ranges import affine_scale, symmetric_scale

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("one_export")
FFN = "bert.encoder.layer.0.intermediate.dense"


@pytest.fixture(scope="module")
def bert():
    return tiny.model("bert", num_hidden_layers=1)


@pytest.fixture
def feed():
    found = [tiny.inputs("bert", batch=4, length=12, seed=seed) for seed in range(2)]
    return [{**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])} for batch in found]


def coarse(target):
    """A scale with which rounding is felt."""
    return symmetric_scale(torch.tensor(target.weight), target.axis, bits=4).numpy()


def graph_of(exported):
    program = exported.components["model"].program
    split_gemms(program)
    targets = find_targets(program, lone_convolution=True)
    return exported, program, targets


def test_errors_are_the_slow_ones_and_go_off_the_bias(bert, feed, one_export):
    exported, program, targets = graph_of(one_export(bert, tiny.tokenizer()))
    grids, scales = [affine_scale(-3.0, 3.0)] * len(targets), [coarse(target) for target in targets]
    errors = mean_errors(exported, program, targets, grids, scales, feed)
    seen = []
    bert.get_submodule(FFN).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for batch in feed:
        tiny.logits(bert, batch)
    x = torch.cat([x[batch["attention_mask"] != 0] for x, batch in zip(seen, feed, strict=True)]).double()
    scale, zero_point = grids[0]
    rounded = ((x / scale).round() + zero_point).clamp(0, 255).sub(zero_point) * scale
    weight = bert.get_submodule(FFN).weight.detach().double()
    place = [target.module for target in targets].index(FFN)
    steps = torch.tensor(scales[place]).double()[:, None]
    expected = (rounded @ ((weight / steps).round() * steps).T - x @ weight.T).mean(dim=0)
    np.testing.assert_allclose(errors[place], expected.numpy(), atol=1e-5)

    taken = correct_biases(exported, program, targets, grids, scales, feed)
    assert taken[FFN] == pytest.approx(expected.abs().mean().item(), abs=1e-5)
    add = targets[place].node.outputs[0].uses()[0].node
    bias = next(value.const_value.numpy() for value in add.inputs if value.const_value is not None)
    np.testing.assert_allclose(bias, bert.get_submodule(FFN).bias.detach() - expected.float(), atol=1e-5)


def test_mean_output_error_is_smaller_after_it(bert, feed):
    """Of the whole graph, whose layers pass their errors on; ranges that clip make the error large."""
    learned = {name: (-1.0, 1.0) for name, module in bert.named_modules() if name.endswith("dense")}
    expected = torch.cat([tiny.logits(bert, batch) for batch in feed])
    errors = []
    for corrected in (False, True):
        how = {"learned_ranges": learned, "calibration": feed, "bias_correction": corrected}
        exported, _, results = make_static(bert, tiny.tokenizer(), [], **how)
        errors.append((torch.cat([exported(**batch).logits for batch in feed]) - expected).mean(dim=0).abs().mean())
    assert errors[1] < 0.5 * errors[0]
    assert results["bias_correction"].keys() == results["ranges"].keys()


def test_convolutions_and_layers_without_bias(one_export):
    """The second convolution has a bias, the first and the head get one."""
    from transformers import PretrainedConfig, PreTrainedModel

    class Net(PreTrainedModel):
        config_class = PretrainedConfig
        main_input_name = "pixel_values"

        def __init__(self, config):
            super().__init__(config)
            self.first = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
            self.second = torch.nn.Conv2d(4, 2, 3, stride=2, groups=2)
            self.head = torch.nn.Linear(2, 5, bias=False)

        def forward(self, pixel_values):
            return {"logits": self.head(self.second(self.first(pixel_values).relu()).mean((2, 3)))}

    model = Net(PretrainedConfig(image_size=8)).eval()
    feed = [{"pixel_values": torch.randn(6, 3, 8, 8)}]
    exported, program, targets = graph_of(one_export(model))
    assert [target.module for target in targets] == ["first", "second", "head"]
    grids, scales = [affine_scale(-1.0, 1.5)] * 3, [coarse(target) for target in targets]
    errors = mean_errors(exported, program, targets, grids, scales, feed)
    expected = model.second.bias.detach().numpy() - errors[1]
    correct_biases(exported, program, targets, grids, scales, feed)
    np.testing.assert_allclose(targets[0].bias, -errors[0], atol=1e-6)
    np.testing.assert_allclose(targets[1].bias, expected, atol=1e-6)
    with torch.no_grad():
        model.first.bias = torch.nn.Parameter(torch.tensor(-errors[0]).float())
        model.second.bias.sub_(torch.tensor(errors[1]))
        model.head.bias = torch.nn.Parameter(torch.tensor(-errors[2]).float())
        want = model(**feed[0])["logits"].numpy()
    got = open_session(program).run(None, {"pixel_values": feed[0]["pixel_values"].numpy()})[0]
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert max(np.abs(error).max() for error in errors) > 1e-3
