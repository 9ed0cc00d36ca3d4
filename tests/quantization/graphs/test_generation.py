"""One graph scores, reads prompts and continues them exactly as the PyTorch model does."""

import tracemalloc

import pytest
import torch
from datasets import Dataset
from transformers import MistralConfig, MistralForCausalLM

import exports
import tiny
from hfshrink import compare, evaluate, load, profile
from hfshrink.errors import UnsupportedModelError
from hfshrink.evaluation import measure_latencies
from hfshrink.generation import ExportedCausalLM, has_cache
from hfshrink.quantization.graphs.decoder import export_decoder, generates
from hfshrink.quantization.graphs.dynamic import quantize_dynamic
from hfshrink.quantization.graphs.exporting import fewer_rewrites, own_weights

SEARCHES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 10},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request):
    return exports.of(request.param)


def prompt(length=9, pads=(4, 1, 0), seed=0):
    """Rows padded on the left; longer than the six and two tokens that were traced."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 50, (len(pads), length), generator=generator)
    mask = (torch.arange(length) >= torch.tensor(pads)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def generated(model, batch, **settings):
    torch.manual_seed(0)
    return model.generate(**batch, max_new_tokens=10, **settings)


@pytest.mark.parametrize("search", SEARCHES)
def test_tokens_are_those_of_the_model(pair, search):
    model, exported = pair
    for batch in (prompt(), prompt(1, (0,)), prompt(20, (0, 19))):
        assert torch.equal(generated(exported, batch, **SEARCHES[search]), generated(model, batch, **SEARCHES[search]))


@pytest.mark.parametrize("length", [1, 2, 12])
def test_scores_are_those_of_the_model(pair, length):
    model, exported = pair
    batch = tiny.inputs("llama", batch=3, length=length + 2)
    real = batch["attention_mask"].bool()
    expected, got = tiny.logits(model, batch), exported(**batch).logits
    assert torch.allclose(expected[real], got[real], atol=1e-5)


def test_continuing_equals_scoring_at_once(pair):
    _, exported = pair
    ids = prompt(pads=(0, 0))["input_ids"]
    first = exported(ids[:, :5])
    then = exported(ids[:, 5:], past_key_values=first.past_key_values)
    whole = exported(ids).logits
    assert torch.allclose(torch.cat([first.logits, then.logits], 1), whole, atol=1e-5)
    assert then.past_key_values.get_seq_length() == 9


def test_saved_export_generates_again(pair, tmp_path):
    model, exported = pair
    exported.save_pretrained(tmp_path / "lm")
    files = {file.name for file in (tmp_path / "lm").iterdir()}
    assert {"model.onnx", "model.onnx.data", "generation_config.json"} <= files
    assert not any("prefill" in name or "decode" in name for name in files)
    again = load(tmp_path / "lm")[0]
    assert isinstance(again, ExportedCausalLM)
    assert torch.equal(generated(again, prompt(), do_sample=False), generated(model, prompt(), do_sample=False))


def test_export_leaves_the_model_as_it_was(pair):
    model, exported = pair
    assert exported.config is not model.config
    assert exported.generation_config is not model.generation_config
    assert has_cache(exported)


def test_export_does_not_change_with_the_model(pair):
    """The exporter shares the weights with it."""
    model, exported = pair
    batch = tiny.inputs("llama")
    before, kept = exported(**batch).logits, {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(exports.of(model.config.model_type)[1](**batch).logits, before)
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])


def test_weights_are_copied_one_by_one():
    _, exported = exports.of("llama")
    values = exported.program.graph.initializers.values()
    size = sum(value.const_value.nbytes for value in values)
    tracemalloc.start()
    own_weights(exported)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * size + max(value.const_value.nbytes for value in values)


def test_slow_rewrite_is_left_out_for_one_export():
    rewriter = pytest.importorskip("onnxscript.rewriter")
    before = rewriter._DEFAULT_REWRITE_RULES
    with fewer_rewrites():
        left_out = {rule.name for rule in before} - {rule.name for rule in rewriter._DEFAULT_REWRITE_RULES}
    assert left_out == {"SlicesSplit"}
    assert rewriter._DEFAULT_REWRITE_RULES is before


def test_dynamic_int8_generates_too(pair):
    model, _ = pair
    small = quantize_dynamic(exports.of(model.config.model_type)[1], ["lm_head"])[0]
    assert isinstance(small, ExportedCausalLM)
    batch = prompt()
    real = batch["attention_mask"].bool()
    expected, got = tiny.logits(model, batch)[real], small(**batch).logits[real]
    assert 0 < (expected - got).abs().mean() < 0.1 * expected.abs().mean()
    assert generated(small, batch, do_sample=False).shape[0] == 3


def test_export_is_evaluated_compared_and_profiled(pair):
    model, exported = pair
    ids = torch.randint(5, 50, (4, 9)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    found = [evaluate(it, rows, "perplexity").main.value for it in (model, exported)]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert compare(model, exported, rows, metric="perplexity").difference == pytest.approx(0, abs=1e-3)
    timed = measure_latencies({"export": exported}, sequence_length=8, batch_sizes=(1, 2), repeats=2)["export"]
    assert [latency.runtime for latency in timed] == ["onnxruntime"] * 2
    assert profile(exported, sequence_length=8, batch_sizes=(1,), repeats=2, memory=False).size_bytes > 0


@pytest.mark.slow
def test_sliding_windows_hide_what_their_own_cache_would_drop():
    config = {**tiny.CONFIGS["llama"], "sliding_window": 4, "num_hidden_layers": 1}
    model = MistralForCausalLM(MistralConfig(**config)).eval()
    exported = export_decoder(model)
    for length in (3, 9, 20):
        ids = torch.randint(5, 50, (1, length))
        assert torch.allclose(model(ids).logits, exported(ids).logits, atol=1e-5)
        batch = {"input_ids": ids}
        assert torch.equal(generated(exported, batch, do_sample=False), generated(model, batch, do_sample=False))


def test_what_generates():
    assert generates(tiny.model("llama"), None)
    assert not generates(tiny.model("llama"), False)
    assert not generates(tiny.model("bert"), None)
    with pytest.raises(
        UnsupportedModelError, match="generation=True is for causal language models, BertFor.* is none"
    ):
        generates(tiny.model("bert"), True)


def test_export_without_cache_is_refused(pair):
    _, exported = pair
    with pytest.raises(UnsupportedModelError, match="one graph with past_key_values, got the graphs a, b"):
        ExportedCausalLM(dict.fromkeys("ab", exported.components["model"]), "onnx", exported.config)
