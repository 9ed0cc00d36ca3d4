"""A record with something in each of its fields, and texts that try to be markup."""

from hfshrink import CompressionReport
from hfshrink.measurement import Latency, Measurement, Score
from hfshrink.record import StepRecord

PARITY = {
    "inputs": "calibration rows",
    "rows": 64,
    "max_difference": 0.123,
    "mean_difference": 0.01,
    "agreement": 0.984,
}
SUBSET = {
    "method": "ccs",
    "rows": 10_000,
    "size": 1000,
    "seed": 3,
    "source": "arXiv:2210.15809",
    "data": "org/reviews",
    "split": "train",
    "columns": {"text": "aa11"},
    "balance": [
        {"column": "label", "name": "good", "full": 6000, "kept": 610},
        {"column": "label", "name": "bad", "full": 4000, "kept": 390},
    ],
}
COMPARISON = {
    "task": "text-classification",
    "metric": "accuracy",
    "a": 0.8435,
    "b": 0.841537,
    "difference": -0.001963,
    "low": -0.01,
    "high": 0.006,
    "examples": 2000,
    "mcnemar_p": 0.689,
    "agreement": 0.972,
    "right_to_wrong": 30,
    "wrong_to_right": 26,
    "worst_class": {"name": "negative", "recall_a": 0.85, "recall_b": 0.83},
    "calibration_error_a": 0.04,
    "calibration_error_b": 0.05,
}
GROUPS = {
    "mean": 0.841537,
    "groups": [
        {"name": "long", "value": 0.75, "low": 0.7, "high": 0.8, "rows": 150},
        {"name": "short", "value": 0.86, "low": 0.84, "high": 0.88, "rows": 1850},
    ],
}
EVIL = (
    "x\n---\nlicense: mit\n---\n# Fake <script>alert(1)</script> [link](http://evil.example) ![i](http://e.org) "
    "`code` a\\|b | c www.evil.example\r\n```\n~~~\n- *b* __c__ ~~d~~ $x$ &lt;b&gt; \u202e\x00 {{ 7 - 7 }} {% raw %} "
    "<!-- hfshrink:end --> !!python/object:os.system *alias &anchor : # no comment"
)


def full_report(text=lambda value: value, names=lambda value: value):
    """The record; `text` is called on each text of others in it, `names` on those that must stay what they are."""
    runtime, processor = text("onnxruntime"), text("Some CPU")
    times = [Latency(s * 5.2, s * 5.9, s * 5.1, runtime, processor, 1, 1, 128, 40) for s in (2, 1)]
    where = {"dataset": names("org/reviews"), "split": text("test"), "examples": 2000}
    sizes = [Measurement(parameters=22_713_986), Measurement(parameters=17_390_594)]
    steps = (
        StepRecord(
            "make_student",
            text("layers"),
            {text("num_layers"): 3},
            *sizes,
            seconds=0.16,
            source="arXiv:1910.01108, " + text("Sanh et al."),
            versions={"torch": "2.13.0"},
        ),
        StepRecord(
            "distill",
            text("logits"),
            {"label_weight": 0.5, "num_train_epochs": 4, "seed": 7},
            results={"train_examples": 6000, "steps": 752},
            seconds=277.5,
            source="arXiv:1503.02531",
            versions={"torch": "2.13.0"},
        ),
        StepRecord(
            "quantize",
            "onnx-int8",
            skipped={text("classifier"): text("task head")},
            results={"parity": {**PARITY, "inputs": text(PARITY["inputs"])}, "note": text("Embeddings stay 8-bit.")},
            versions={"hfshrink": "0.1.0", "torch": text("2.13.0")},
        ),
    )
    base = Measurement(
        parameters=22_713_986,
        size_bytes=90_900_000,
        loaded_bytes=120_000_000,
        latency=(times[0],),
        scores=(Score(text("accuracy"), 0.8435, **where),),
    )
    compressed = Measurement(
        parameters=17_390_594,
        size_bytes=17_800_000,
        loaded_bytes=30_000_000,
        latency=(times[1],),
        scores=(Score(text("accuracy"), 0.841537, 0.825, 0.857, **where),),
    )
    worst = {**COMPARISON["worst_class"], "name": text("negative")}
    groups = [{**group, "name": text(group["name"])} for group in GROUPS["groups"]]
    details = {
        "task": "text-classification",
        "subset": SUBSET,
        "comparison": {**COMPARISON, "metric": text("accuracy"), "worst_class": worst},
        "groups": {**GROUPS, "groups": groups},
        "dataset_revisions": {"org/reviews": "abc123"},
        "plots": [{"file": "plots/size-metric.png", "caption": text("Size against accuracy")}],
    }
    return CompressionReport(names("org/base"), steps, base, compressed, details)
