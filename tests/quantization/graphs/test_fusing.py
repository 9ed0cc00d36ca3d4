"""`fuse_graph`: the rewritten graph computes what the old one did, with masks, empty rows and shared keys."""

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch

import tiny
from hfshrink.quantization.graphs import fusing
from hfshrink.quantization.graphs.exporting import export_float
from hfshrink.quantization.graphs.fusing import fuse_graph

HEADS, SIZE = 2, 4
HEAD = f"""
<ir_version: 9, opset_import: ["" : 20]>
graph (float[b, n, 8] q, float[b, n, 8] k, float[b, n, 8] v, float[b, 1, 1, n] mask) => (float[b, n, 8] y)
<int64[4] split = {{0, 0, {HEADS}, {SIZE}}}, int64[3] join = {{0, 0, 8}}, float half = {{0.5}}, float zero = {{0}},
 int64[1] last = {{-1}}, int64[1] two = {{-2}}, int64[1] none = {{0}}, int64[1] end = {{9223372036854775807}}>
{{
  q0 = Reshape(q, split)
  qh = Transpose<perm=[0, 2, 1, 3]>(q0)
  k0 = Reshape(k, split)
  v0 = Reshape(v, split)
  vh = Transpose<perm=[0, 2, 1, 3]>(v0)
"""
ONE_STEP = "kt = Transpose<perm=[0, 2, 3, 1]>(k0)"
TWO_STEPS = "kh = Transpose<perm=[0, 2, 1, 3]>(k0) kt = Transpose<perm=[0, 1, 3, 2]>(kh)"
FLATTENED = """
  kh = Transpose<perm=[0, 2, 1, 3]>(k0)
  sizes = Shape(kh)
  length = Slice(sizes, two, last)
  size = Slice(sizes, last, end)
  outer = Slice(sizes, none, two)
  flat = Concat<axis=0>(last, length, size)
  k3 = Reshape(kh, flat)
  k3t = Transpose<perm=[0, 2, 1]>(k3)
  back = Concat<axis=0>(outer, size, length)
  kt = Reshape(k3t, back)
"""
SCORES = "s = MatMul(qh, kt) scaled = Mul(s, half) masked = Add(scaled, mask) p = Softmax<axis=-1>(masked)"
END = "o = MatMul(p, vh) ot = Transpose<perm=[0, 2, 1, 3]>(o) y = Reshape(ot, join) }"


def program_of(*parts):
    proto = onnx.parser.parse_model("\n".join((HEAD, *parts)))
    return onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def ops(program):
    return [node.op_type for node in program.graph]


def run(program, *inputs, outputs=1):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(program).SerializeToString(), options)
    names = [value.name for value in session.get_inputs()]
    found = session.run(None, dict(zip(names, inputs, strict=True)))
    return found[0] if outputs == 1 else found


@pytest.fixture
def inputs():
    generator = np.random.default_rng(0)
    q, k, v = (generator.standard_normal((3, 5, HEADS * SIZE)).astype(np.float32) for _ in range(3))
    mask = np.zeros((3, 1, 1, 5), np.float32)
    mask[1, ..., 3:] = -1e9
    return q, k, v, mask


def attention(q, k, v, mask):
    q, k, v = (torch.tensor(one).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for one in (q, k, v))
    return ((q @ k.mT / 2 + torch.tensor(mask)).softmax(-1) @ v).transpose(1, 2).flatten(2).numpy()


@pytest.mark.parametrize("key", [ONE_STEP, TWO_STEPS, FLATTENED], ids=["one step", "two steps", "flattened"])
def test_attention_becomes_one_node_and_gives_the_same(key, inputs):
    program = program_of(key, SCORES, END)
    assert fuse_graph(program) == {"attention": 1, "norms": 0}
    assert "Softmax" not in ops(program)
    assert "Transpose" not in ops(program)
    assert np.abs(run(program, *inputs) - attention(*inputs)).max() < 1e-6


def test_scale_on_both_sides_is_multiplied(inputs):
    scores = (
        "qs = Mul(qh, half) ks = Mul(half, kt) s = MatMul(qs, ks) masked = Add(s, mask) p = Softmax<axis=-1>(masked)"
    )
    program = program_of(ONE_STEP, scores, END)
    expected = attention(inputs[0] / 2, *inputs[1:])
    assert fuse_graph(program)["attention"] == 1
    assert np.abs(run(program, *inputs) - expected).max() < 1e-6


def test_rows_without_tokens_give_zeros(inputs):
    end = """
      some = Cast<to=1>(mask) least = ReduceMax<keepdims=1>(some, last) low = Neg(big) empty = Less(least, low)
      o = MatMul(p, vh) w = Where(empty, zero, o) ot = Transpose<perm=[0, 2, 1, 3]>(w) y = Reshape(ot, join) }
    """
    head = HEAD.replace("float zero", "float big = {1000.0}, float zero")
    program = onnx_ir.from_proto(
        onnx.shape_inference.infer_shapes(onnx.parser.parse_model(head + ONE_STEP + SCORES + end), data_prop=True)
    )
    inputs[3][2] = -1e9
    expected = attention(*inputs)
    expected[2] = 0
    assert fuse_graph(program)["attention"] == 1
    assert np.abs(run(program, *inputs) - expected).max() < 1e-6


@pytest.mark.parametrize(
    "parts",
    [
        (ONE_STEP, SCORES, "o = MatMul(p, vh) y0 = Reshape(o, join) y = Identity(y0) }"),
        (
            ONE_STEP,
            SCORES,
            "pp = Add(p, p) o = MatMul(pp, vh) ot = Transpose<perm=[0, 2, 1, 3]>(o) y = Reshape(ot, join) }",
        ),
        ("kt = Transpose<perm=[0, 2, 3, 1]>(k0)", SCORES.replace("axis=-1", "axis=1"), END),
        (FLATTENED.replace("(outer, size, length)", "(outer, length, size)"), SCORES, END),
    ],
    ids=["heads never merged", "changed weights", "another axis", "flattened but not swapped"],
)
def test_other_forms_stay(parts):
    program = program_of(*parts)
    before = ops(program)
    assert fuse_graph(program) == {"attention": 0, "norms": 0}
    assert ops(program) == before
    assert program.opset_imports[""] == 20


def test_weights_that_are_an_output_stay():
    program = program_of(ONE_STEP, SCORES, END)
    weights = next(node for node in program.graph if node.op_type == "Softmax").outputs[0]
    program.graph.outputs.append(weights)
    assert fuse_graph(program)["attention"] == 0


def test_one_mask_serves_queries_of_two_lengths():
    """Its spread form of one attention does not fit the other one; the first to begin is the last to end here."""
    second = """
      r4 = Reshape(r, split) rh = Transpose<perm=[0, 2, 1, 3]>(r4) s5 = MatMul(rh, kt) a5 = Mul(s5, half)
      c5 = Add(a5, m) p5 = Softmax<axis=-1>(c5) o5 = MatMul(p5, vh) t5 = Transpose<perm=[0, 2, 1, 3]>(o5)
      z = Reshape(t5, join)
    """
    program, feed = almost({"r": "b, i, 8"}, {"t": STEPS["t"] + second})
    program.graph.outputs.append(next(value for node in program.graph for value in node.outputs if value.name == "z"))
    before = run(program, *feed, outputs=2)
    assert fuse_graph(program)["attention"] == 2
    assert [value.name for value in program.graph.outputs] == ["y", "z"]
    for old, new in zip(before, run(program, *feed, outputs=2), strict=True):
        assert np.abs(old - new).max() < 1e-6


@pytest.mark.parametrize(("version", "attentions"), [("1.22.1", 0), ("1.23.0", 1), ("2.0", 1)])
def test_an_older_onnx_runtime_keeps_the_parts(monkeypatch, version, attentions):
    monkeypatch.setattr(fusing, "version", lambda package: {"onnxruntime": version}[package])
    program = program_of(ONE_STEP, SCORES, END)
    assert fuse_graph(program)["attention"] == attentions


def test_a_bias_before_a_norm_stays_an_addition():
    """ONNX Runtime fuses it with the product, and has no second branch to skip."""
    text = """<ir_version: 9, opset_import: ["" : 20]> graph (float[b, 2] x, float[b, 2] z) => (float[b, 2] y)
    <float[2] g = {1, 1}> { a = Add(x, g) n = LayerNormalization(a, g) c = Add(n, z) y = LayerNormalization(c, g) }"""
    program = onnx_ir.from_proto(onnx.parser.parse_model(text))
    assert fuse_graph(program)["norms"] == 1
    assert ops(program) == ["Add", "LayerNormalization", "Sum", "LayerNormalization"]


def test_group_norm_stops_the_newer_operator_set():
    """GroupNormalization counts its scale per channel from operator set 21 on, per group before."""
    program = program_of(ONE_STEP, SCORES, END)
    program.graph.append(onnx_ir.node("GroupNormalization", [program.graph.inputs[0]]))
    assert fuse_graph(program)["attention"] == 0


INPUTS = {"q": "b, n, 8", "k": "b, n, 8", "v": "b, n, 8", "m": "b, 1, 1, n"}
STEPS = {
    "q4": "Reshape(q, split)",
    "qh": "Transpose<perm=[0, 2, 1, 3]>(q4)",
    "k4": "Reshape(k, split)",
    "kt": "Transpose<perm=[0, 2, 3, 1]>(k4)",
    "v4": "Reshape(v, split)",
    "vh": "Transpose<perm=[0, 2, 1, 3]>(v4)",
    "s": "MatMul(qh, kt)",
    "a": "Mul(s, half)",
    "c": "Add(a, m)",
    "p": "Softmax<axis=-1>(c)",
    "o": "MatMul(p, vh)",
    "t": "Transpose<perm=[0, 2, 1, 3]>(o)",
    "y": "Reshape(t, join)",
}
SIZES = {"b": 3, "n": 6, "i": 5, "w": 8}
ALMOST = {  # what is changed -> attentions that are the same thing, other inputs, other steps
    "nothing": (1, {}, {}),
    "no mask": (1, {}, {"c": "Identity(a)", "p": "Softmax<axis=-1>(a)"}),
    "a mask per query": (1, {"m": "1, 1, n, n"}, {}),
    "a mask per head": (1, {"m": "b, 2, n, n"}, {}),
    "the mask on the left": (1, {}, {"c": "Add(m, a)"}),
    "the mask is a product itself": (
        1,
        {},
        {
            "c": "MatMul(qm, em) d = Add(a, c)",
            "p": "Softmax<axis=-1>(d)",
            "qm": "Transpose<perm=[0, 2, 1, 3]>(q4)",
            "em": "Transpose<perm=[0, 1, 3, 2]>(qm)",
        },
    ),
    "other values than keys": (1, {"v": "b, n, 12"}, {"v4": "Reshape(v, wide)", "y": "Reshape(t, twelve)"}),
    "a second reader of the scores": (1, {}, {"s": "MatMul(qh, kt) extra = Neg(s)"}),
    "a second reader of the weights": (0, {}, {"p": "Softmax<axis=-1>(c) extra = Neg(p)"}),
    "weights scaled": (0, {}, {"o": "MatMul(p2, vh)", "p": "Softmax<axis=-1>(c) p2 = Mul(p, half)"}),
    "two masks": (0, {}, {"c": "Add(c0, m)", "a": "Mul(s, half) c0 = Add(a, m)"}),
    "mask before scale": (0, {}, {"c": "Add(s, m) d = Mul(c, half)", "p": "Softmax<axis=-1>(d)"}),
    "a scale per head": (0, {"z": "1, 2, 1, 1"}, {"a": "Mul(s, z)"}),
    "a scale that is computed": (0, {"z": "1"}, {"a": "Mul(s, z)"}),
    "a negative scale": (0, {}, {"a": "Mul(s, less)"}),
    "the same queries for all rows": (0, {"q": "1, n, 8"}, {}),
    "more masks than rows": (0, {"q": "1, n, 8", "k": "1, n, 8", "v": "1, n, 8"}, {}),
    "attention within pieces": (
        0,
        {"m": "1, 1, 1, 1"},
        {"q4": "Reshape(q, pieces)", "k4": "Reshape(k, pieces)", "v4": "Reshape(v, pieces)", "y": "Reshape(t, pairs)"},
    ),
    "heads joined with the length": (0, {}, {"y": "Reshape(t, long)"}),
    "a width that is free": (
        0,
        dict.fromkeys("qkv", "b, n, w"),
        {"q4": "Reshape(q, free)", "k4": "Reshape(k, free)", "v4": "Reshape(v, free)"},
    ),
    "past keys": (
        0,
        {"z": "b, 2, 4, i", "u": "b, 2, i, 4", "m": "b, 1, 1, 1"},
        {
            "kt": STEPS["kt"] + " kp = Concat<axis=3>(z, kt)",
            "vh": STEPS["vh"] + " vp = Concat<axis=2>(u, vh)",
            "s": "MatMul(qh, kp)",
            "o": "MatMul(p, vp)",
        },
    ),
    "one key head for both": (0, {"k": "b, n, 4", "v": "b, n, 4"}, {"k4": "Reshape(k, one)", "v4": "Reshape(v, one)"}),
    "keys not transposed": (
        0,
        {"k": "b, 4, 8", "m": "b, 1, 1, 4", "v": "b, 4, 8"},
        {"kt": "Transpose<perm=[0, 2, 1, 3]>(k4)"},
    ),
    "softmax over queries": (0, {}, {"p": "Softmax<axis=2>(c)"}),
}


def almost(inputs, steps):
    inputs = {**INPUTS, **inputs}
    head = ", ".join(f"float[{shape}] {name}" for name, shape in inputs.items())
    first = [name for name in steps if name not in STEPS]
    order = [*list(STEPS)[:1], *first, *list(STEPS)[1:]]
    body = "\n".join(f"{name} = {({**STEPS, **steps})[name]}" for name in order)
    constants = """int64[4] split = {0, 0, 2, 4}, int64[3] join = {0, 0, 8}, float half = {0.5}, float less = {-0.5},
      int64[4] wide = {0, 0, 2, 6}, int64[3] twelve = {0, 0, 12}, int64[4] pieces = {-1, 2, 2, 4},
      int64[3] pairs = {0, 0, 8}, int64[3] long = {0, -1, 4}, int64[4] free = {0, 0, 2, -1},
      int64[4] one = {0, 0, 1, 4}"""
    text = f'<ir_version: 9, opset_import: ["" : 20]> graph ({head}) => (float[] y) <{constants}> {{ {body} }}'
    shapes = [[SIZES.get(size.strip()) or int(size) for size in shape.split(",")] for shape in inputs.values()]
    generator = np.random.default_rng(0)
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    return onnx_ir.from_proto(proto), [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("change", ALMOST)
def test_a_graph_is_rewritten_only_where_it_computes_the_same(change):
    fused, inputs, steps = ALMOST[change]
    program, feed = almost(inputs, steps)
    before = run(program, *feed)
    assert fuse_graph(program)["attention"] == fused
    after = run(program, *feed)
    assert before.shape == after.shape
    assert np.abs(before - after).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("family", "norms"), [("bert", 5), ("vit", 4)])  # a ViT adds constant positions first
def test_exports_of_a_family_fuse_every_layer(family, norms):
    model = tiny.model(family)
    exported = export_float(model)
    program = exported.components["model"].program
    assert fuse_graph(program) == {"attention": 2, "norms": norms}
    assert "Softmax" not in ops(program)
    assert ops(program).count("Expand") <= 4  # the layers share one mask
    if family == "bert":
        inputs = {
            "input_ids": torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0], [3, 0, 0, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]),  # the last has no token
            "token_type_ids": torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]),
        }
    else:
        inputs = {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    assert torch.allclose(exported(**inputs).logits, tiny.logits(model, inputs), atol=1e-5)
