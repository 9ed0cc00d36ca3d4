"""Where the time of int8 goes in ONNX Runtime, and what each way to run a part of it costs.

`--models` profiles and times MiniLM-L6 and four layers of BERT-base's shape: float, raw `quantize_dynamic` with its
defaults, ours without and with fused graphs; interleaved, one thread. `--overhead` times `quantize` against
transformers' exporter and quantizer alone. `--kernels` times the ways that a part of a layer can be written. Each
keeps what it finds in runs/quantization/nodes, and goes on from there when it is started again.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import be_quiet, save  # adds the examples' folder, where assets is
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

import assets
from hfshrink import quantize
from hfshrink.evaluation import measure_latencies
from hfshrink.inputs import random_inputs
from hfshrink.quantization.graphs.dynamic import quantize_dynamic
from hfshrink.quantization.graphs.exporting import export_float, quiet
from hfshrink.quantization.graphs.fusing import fuse_graph
from hfshrink.quantization.graphs.parity import check_parity
from hfshrink.quantization.graphs.profiling import OpTime, node_table, profile_nodes
from hfshrink.terminal import table

KEPT = Path(__file__).resolve().parent / "runs" / "quantization" / "nodes"
LENGTH, BATCHES, ROUNDS, REPEATS = 128, (1, 8), 30, 3
HEAD = ["classifier"]


def models():
    """Name -> float model."""
    torch.manual_seed(0)
    shape = {"hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12, "intermediate_size": 3072}
    return {
        "MiniLM-L6": AutoModelForSequenceClassification.from_pretrained(assets.minilm(), dtype=torch.float32).eval(),
        "BERT-base, 4 layers": BertForSequenceClassification(BertConfig(**shape)).eval(),
    }


def variants(model):
    """Name -> export, from one float graph."""
    exported = export_float(model)
    fused = _with(exported, exported.components["model"].program.clone())
    fuse_graph(fused.components["model"].program)
    return {
        "fp32": exported,
        "fp32, fused": fused,
        "int8, raw defaults": _with(exported, _raw(exported)),
        "int8, not fused": quantize_dynamic(exported, HEAD)[0],
        "int8": quantize_dynamic(fused, HEAD)[0],
    }


def _with(exported, program):
    from transformers.exporters import ExportedComponent, ExportedModel

    components = {"model": ExportedComponent(program, exported.components["model"].metadata)}
    return ExportedModel(components, exported.export_format, config=exported.config)


def _raw(exported):
    """What `onnxruntime.quantization.quantize_dynamic` makes by its defaults."""
    import onnx
    import onnx_ir
    from onnxruntime.quantization import quantize_dynamic as raw

    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        proto = onnx_ir.to_proto(exported.components["model"].program)
        del proto.graph.value_info[:]  # it names other shapes than ONNX infers
        onnx.save(proto, source)
        raw(source, target)
        return onnx_ir.from_proto(onnx.load(target))


def measure_models():
    found = _kept("models")
    for name, model in models().items():
        if name in found:
            continue
        made = variants(model)
        inputs = random_inputs(made["fp32"], 1, LENGTH)
        times = measure_latencies(made, sequence_length=LENGTH, batch_sizes=BATCHES, threads=1, repeats=ROUNDS)
        found[name] = {
            variant: {
                "bytes": _bytes(export),
                "cpu_ms": [one.cpu_ms for one in times[variant]],
                "nodes": [vars(row) for row in profile_nodes(export, inputs)],
            }
            for variant, export in made.items()
        }
        _keep("models", found)  # what is measured stays when the next model is cut off


def _bytes(exported):
    with tempfile.TemporaryDirectory() as folder:
        exported.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).iterdir() if ".onnx" in path.name)


def measure_overhead():
    """CPU seconds of `quantize` and of what it is made of, and of the bare calls, MiniLM-L6; interleaved."""
    model = models()["MiniLM-L6"]
    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    _bare(model, tokenizer)  # imports
    found = _kept("overhead")
    while len(found.get("bare", ())) < REPEATS:
        seconds, exported = _seconds(lambda: quantize(model, "onnx-int8", processor=tokenizer))
        found.setdefault("quantize", []).append(seconds)
        check = (model, exported, tokenizer, "text-classification")
        found.setdefault("check_parity", []).append(_seconds(lambda check=check: check_parity(*check))[0])
        found.setdefault("bare", []).append(_seconds(lambda: _bare(model, tokenizer))[0])
        _keep("overhead", found)


def _bare(model, tokenizer):
    """The same int8 through transformers alone: exporter and quantizer with their defaults, in memory."""
    from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    config = OnnxConfig(dynamic=True, quantizer=OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig()))
    with torch.no_grad(), quiet():
        return OnnxExporter().export(model, random_inputs(model, 2, 8, tokenizer, pairs=True), config)


def _seconds(call):
    start = time.process_time()
    made = call()
    return time.process_time() - start, made


def measure_kernels():
    """Name of the part -> {way: CPU microseconds}, of MiniLM-L6's shapes; the first way is the one that is used."""
    found = {
        f"{part}, batch {batch}": _time({name: _session(*way) for name, way in ways.items()}, 20 if batch == 1 else 4)
        for batch in BATCHES
        for part, ways in _kernels(batch, 384, 12).items()
    }
    _keep("kernels", found)


def _kept(name):
    path = KEPT / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _keep(name, found):
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def _kernels(batch, width, heads):
    """Part -> way -> (graph body, inputs, constants)."""
    rng = np.random.default_rng(0)

    def some(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    inner, size = 4 * width, width // heads
    x, wide = {"x": some(batch, LENGTH, width)}, {"x": some(batch, LENGTH, inner)}
    pair = {**x, "r": some(batch, LENGTH, width)}
    norm = {"g": some(width), "b": some(width)}
    qkv = {name: some(batch, LENGTH, width) for name in "qkv"}
    ones = {"m": np.zeros((batch, 1, LENGTH, LENGTH), np.float32)}
    weight = some(width, inner) / 20
    codes = {"w": (weight * 500).clip(-127, 127).astype(np.int8), "s": np.full(inner, 0.002, np.float32)}
    three = {"w": codes["w"][:, : 3 * width], "s": codes["s"][: 3 * width], "b": some(3 * width)}
    thirds = {f"w{i}": codes["w"][:, i * width : (i + 1) * width] for i in range(3)}
    parts = {"a": np.array([0, 0, heads, size]), "z": np.array([0, 0, width]), "c": np.float32(size**-0.5)}
    ms = "com.microsoft."
    each = "".join(f"y{i} = {ms}MatMulIntegerToFloat(u, w{i}, us, s, uz, , b)" for i in range(3))
    split = "".join(f"{n}4 = Reshape({n}, a) " for n in "qkv") + (
        "qt = Transpose<perm=[0,2,1,3]>(q4) kt = Transpose<perm=[0,2,3,1]>(k4) vt = Transpose<perm=[0,2,1,3]>(v4) "
        "s0 = MatMul(qt, kt) s1 = Mul(s0, c) s2 = Add(s1, m) p = Softmax<axis=-1>(s2) o = MatMul(p, vt) "
        "ot = Transpose<perm=[0,2,1,3]>(o) y = Reshape(ot, z)"
    )
    one = f"<num_heads={heads}>"
    two = f"<q_num_heads={heads}, kv_num_heads={heads}>"
    bias = {"b": some(inner)}
    return {
        "sum and norm": {
            "Sum, LayerNormalization": ("t = Sum(x, r) y = LayerNormalization(t, g, b)", pair, norm),
            "SkipLayerNormalization": (f"y = {ms}SkipLayerNormalization(x, r, g, b)", pair, norm),
        },
        "attention with a mask": {
            "Attention": (f"y = Attention{two}(q, k, v, m)", {**qkv, **ones}, {}),
            "its parts": (split, {**qkv, **ones}, parts),
            "MultiHeadAttention": (f"y = {ms}MultiHeadAttention{one}(q, k, v, , , m)", {**qkv, **ones}, {}),
        },
        "q, k and v": {
            "3 products, one DynamicQuantizeLinear": (
                f"u, us, uz = DynamicQuantizeLinear(x) {each} y = Identity(y0)",
                x,
                {**thirds, "s": codes["s"][:width], "b": norm["b"]},
            ),
            "one product, Split": (
                f"t = {ms}DynamicQuantizeMatMul(x, w, s, , b) y0, y1, y2 = Split<axis=-1, num_outputs=3>(t) "
                "y = Identity(y0)",
                x,
                three,
            ),
        },
        "q, k, v and attention": {
            "3 products, Attention": (
                f"u, us, uz = DynamicQuantizeLinear(x) {each} y = Attention{two}(y0, y1, y2, m)",
                {**x, **ones},
                {**thirds, "s": codes["s"][:width], "b": norm["b"]},
            ),
            "QAttention": (
                f"u, us, uz = DynamicQuantizeLinear(x) y = {ms}QAttention{one}(u, w, b, us, s, i, uz, wz)",
                {**x, "i": np.ones((batch, LENGTH), np.int32)},
                {**three, "wz": np.zeros(3 * width, np.int8)},
            ),
        },
        "product of the first half of the feed-forward": {
            "DynamicQuantizeMatMul": (f"y = {ms}DynamicQuantizeMatMul(x, w, s, , b)", x, {**codes, **bias}),
            **{
                f"MatMulNBits, {bits} bits, blocks of {block}": _blocks(x, bias, width, inner, bits, block)
                for bits, block in ((8, 128), (8, 32), (4, 32))
            },
            "fp32": ("t = MatMul(x, w) y = Add(t, b)", x, {"w": weight, **bias}),
        },
        "activation": {
            "Gelu": ("y = Gelu(x)", wide, {}),
            "Gelu, tanh": ('y = Gelu<approximate="tanh">(x)', wide, {}),
            "FastGelu": (f"y = {ms}FastGelu(x)", wide, {}),
            "BiasGelu": (f"y = {ms}BiasGelu(x, b)", wide, bias),
        },
    }


def _blocks(x, bias, width, inner, bits, block):
    rng = np.random.default_rng(1)
    count = width // block
    codes = rng.integers(0, 256, (inner, count, block * bits // 8)).astype(np.uint8)
    scales = np.full((inner, count), 0.002, np.float32)
    settings = f"K={width}, N={inner}, bits={bits}, block_size={block}, accuracy_level=4"
    return f"y = com.microsoft.MatMulNBits<{settings}>(x, w, s, , , b)", x, {"w": codes, "s": scales, **bias}


def _session(body, inputs, constants):
    """A session over one small graph, and its inputs."""
    import onnx
    import onnxruntime

    kinds = {np.dtype(np.float32): "float", np.dtype(np.int32): "int32"}
    ins = ", ".join(f"{kinds[v.dtype]}[{','.join(map(str, v.shape))}] {name}" for name, v in inputs.items())
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]> graph ({ins}) => (float[] y) {{ {body} }}'
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options), inputs


def _time(sessions, calls, rounds=8):
    """Median CPU microseconds per call, the ways interleaved in blocks."""
    order, found = random.Random(0), {name: [] for name in sessions}
    for _ in range(rounds):
        for name in order.sample(list(sessions), len(sessions)):
            session, inputs = sessions[name]
            session.run(None, inputs)
            for _ in range(calls):
                start = time.process_time_ns()
                session.run(None, inputs)
                found[name].append((time.process_time_ns() - start) / 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def render():
    """Write results/quantization_nodes.json and .md of what was measured."""
    tables = {"models": _models_text, "overhead": _overhead_text, "kernels": _kernels_text}
    found = {name: part for name in tables if (part := _kept(name))}
    save("quantization_nodes", found, "\n\n".join(tables[name](part) for name, part in found.items()))


def _models_text(found):
    rows, profiles = [], []
    for name, made in found.items():
        base, fused = made["fp32"], made["fp32, fused"]
        for variant, row in made.items():
            times = zip(row["cpu_ms"], base["cpu_ms"], fused["cpu_ms"], strict=True)
            speed = [f"{now:.1f} ms ({plain / now:.2f}×, {best / now:.2f}×)" for now, plain, best in times]
            size = f"{row['bytes'] / 1e6:.1f} MB ({base['bytes'] / row['bytes']:.2f}×)"
            rows.append((name, variant, size, *speed))
        for variant in ("fp32", "fp32, fused", "int8, raw defaults", "int8"):
            ops = [OpTime(**one) for one in made[variant]["nodes"]]
            profiles.append(f"{name}, {variant}:\n\n{node_table(ops, 8)}")
    header = ("model", "graph", "file", "CPU, batch 1", "CPU, batch 8")
    note = f"CPU time of one thread, {LENGTH} tokens, interleaved; × is against fp32, plain and fused."
    return "\n\n".join((table(header, rows), note, *profiles))


def _overhead_text(found):
    ours, check, bare = (statistics.median(found[name]) for name in ("quantize", "check_parity", "bare"))
    return (
        f'`quantize(model, "onnx-int8")` of MiniLM-L6 takes {ours:.1f} s CPU, transformers\' exporter and quantizer '
        f"with their defaults {bare:.1f} s: {ours / bare - 1:+.0%}. The check against the float model takes "
        f"{check:.1f} s of it; without the check {(ours - check) / bare - 1:+.0%}. Median of {len(found['bare'])}, "
        "interleaved."
    )


def _kernels_text(found):
    rows = []
    for part, ways in found.items():
        first = next(iter(ways.values()))
        rows += [(part, way, f"{micro:.0f}", f"{micro / first:.2f}×") for way, micro in ways.items() if len(ways) > 1]
    return table(("part (MiniLM-L6's shapes)", "written as", "CPU µs", "against the first"), rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", action="store_true", help="profile and time the models")
    parser.add_argument("--overhead", action="store_true", help="time quantize against the bare calls")
    parser.add_argument("--kernels", action="store_true", help="time the ways to write a part")
    options = parser.parse_args()
    be_quiet()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parts = {"models": measure_models, "overhead": measure_overhead, "kernels": measure_kernels}
    for name, measure in parts.items():
        if getattr(options, name):
            measure()
    render()


if __name__ == "__main__":
    main()
