"""The cards of model_cards/: records of real runs, measured here, and the cards rendered from them.

Base and compressed model are tried on the same test rows, which chose nothing, and timed interleaved in one run, one
thread. Each stage (scores, sizes, times) of each model is kept in runs/cards, so that a stopped run goes on; models
are taken from the other benchmarks' runs, and made there where they are missing (hours on 2 cores from nothing).
`--time` measures the times anew: for a quiet machine. `--render` measures nothing: cards and plots from the stored
records.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "model_cards"
BATCHES = (1, 8)
COLOURS = 32  # of a plot

REVIEWS = "MIT (C. J. Hutto and E. E. Gilbert, ICWSM 2014; sentences of Pang and Lee's movie reviews, rated anew)"
MINILM = {"base_model": "sentence-transformers/all-MiniLM-L6-v2", "license": "apache-2.0", "language": "en"}
SMOLLM2 = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0", "language": "en"}
MOVIES = {"data": "movie reviews (Hutto and Gilbert 2014)", "licence": REVIEWS}
STAGES = ("scores", "sizes", "times")
SUBSET = "movie-reviews-30-percent"
CARDS = {
    "minilm-movie-distilled-int8": {
        **MINILM,
        "start": "all-MiniLM-L6-v2-movie-reviews",
        "story": "all-MiniLM-L6-v2 with a new head, fine-tuned for 2 epochs on 6,000 labelled reviews "
        "(examples/quickstart.py); it teaches the student on the same rows. Calibration rows check the graph "
        "alone. Seed 0 of three: the others are in benchmarks/results/main_job.md.",
        "data": [{**MOVIES, "use": "training, calibration (validation rows) and test"}],
    },
    "minilm-movie-pruned": {
        **MINILM,
        "start": "all-MiniLM-L6-v2-movie-reviews",
        "tier": "layer-map",
        "story": "all-MiniLM-L6-v2 with a new head, fine-tuned for 2 epochs on 3,000 labelled reviews "
        "(benchmarks/distillation.py). Nothing was trained after the pruning. Seed 0 of three: the others are in "
        "benchmarks/results/pruning_oneshot.md.",
        "data": [{**MOVIES, "use": "calibration (training rows) and test"}],
    },
    "minilm-movie-factored": {
        **MINILM,
        "start": "all-MiniLM-L6-v2-movie-reviews",
        "tier": "layer-map",
        "story": "all-MiniLM-L6-v2 with a new head, fine-tuned for 2 epochs on 3,000 labelled reviews "
        "(benchmarks/distillation.py). Nothing was trained after the factorization. Seed 0 of three: the others are "
        "in benchmarks/results/factorization.md.",
        "data": [{**MOVIES, "use": "calibration (training rows) and test"}],
    },
    "smollm2-int8": {
        **SMOLLM2,
        "start": "SmolLM2-135M-Instruct",
        "story": "SmolLM2-135M-Instruct with weights that had been rounded to 4 bits in groups of 32 before "
        "(examples/assets.py). Both sides are ONNX graphs with a key-value cache.",
        "data": [
            {
                "data": "NYT editorials (Hutto and Gilbert 2014)",
                "use": "test: 16 rows of 256 tokens",
                "licence": "MIT (the package); texts (c) The New York Times, for research only",
            }
        ],
    },
    "resnet-garments-int8": {
        "license": "apache-2.0",
        "start": "resnet-garments",
        "story": "A ResNet of three stages, trained from fresh weights on 2,000 labelled images "
        "(benchmarks/distillation.py): there is no base on the Hub, and its licence is that of this project. "
        "No image processor belongs to it: it takes pixels / 255, minus 0.286, divided by 0.353.",
        "data": [
            {
                "data": "Fashion-MNIST (Xiao et al. 2017)",
                "use": "training of the base, calibration (training rows) and test",
                "licence": "MIT (Zalando SE, Fashion-MNIST; H. Xiao et al., arXiv:1708.07747)",
            }
        ],
    },
    SUBSET: {
        "license": "mit",
        "language": "en",
        "story": "30 % of 3,000 training rows, as examples/dataset_distillation.py picks them; the embeddings are "
        "those of sentence-transformers/all-MiniLM-L6-v2, which has seen none of the labels. The proof's seconds are "
        "of a machine that was busy with other work: its steps tell what is saved.",
        "data": [{**MOVIES, "use": "the rows that were picked from; test rows were only searched for copies"}],
    },
}
"""Folder of a card -> facts that no run knows."""


def kept(name, stage, make):
    """A stage's part of the record, measured if it is not there."""
    path = ROOT / "runs" / "cards" / name / f"{stage}.json"
    if not path.is_file():
        print(f"{name}: {stage}", flush=True)
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".aside")
        aside.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        aside.replace(path)
    return json.loads(path.read_text())


def one_thread(folder):
    """A model on one thread."""
    import hfshrink

    if not (folder / "export.json").is_file():
        return hfshrink.load(folder)[0]
    from quantization_generation import load_export

    return load_export(folder)


def scores(case):
    """Both models on the same rows, paired, and the compressed one by groups of rows."""
    from model_cards_runs import fingerprints

    import hfshrink
    from hfshrink.record import CompressionReport
    from hfshrink.selection import worst_group

    how = {"split": "test", "batch_size": case.batch_size}
    base, compressed = (
        hfshrink.evaluate(one_thread(folder), case.rows, **how) for folder in (case.base, case.compressed)
    )
    comparison = hfshrink.compare(base, compressed).to_dict()
    details = {
        "task": comparison["task"],
        "comparison": {name: value for name, value in comparison.items() if not name.startswith("scores_")},
        "fingerprints": fingerprints(case),
    }
    if case.groups is not None:
        details["groups"] = worst_group(compressed.correct(), case.groups).to_dict()
    sides = {"base": base.to_measurement(), "compressed": compressed.to_measurement()}
    return CompressionReport(**sides, details=details).to_dict()


def sizes(case):
    """Parameters, files and memory of both."""
    import hfshrink
    from hfshrink.record import CompressionReport

    found = [hfshrink.profile(folder, sequence_length=case.tokens, batch_sizes=()) for folder in _folders(case)]
    return CompressionReport(base=found[0], compressed=found[1]).to_dict()


def times(case):
    """Both models interleaved in one run, one thread."""
    from hfshrink.evaluation import measure_latencies
    from hfshrink.measurement import Measurement
    from hfshrink.record import CompressionReport

    models = {str(place): one_thread(folder) for place, folder in enumerate(_folders(case))}
    found = measure_latencies(models, sequence_length=case.tokens, batch_sizes=BATCHES, repeats=case.repeats)
    return CompressionReport(
        base=Measurement(latency=found["0"]), compressed=Measurement(latency=found["1"])
    ).to_dict()


def _folders(case):
    return case.base, case.compressed


def measure(name):
    """The record of a card as JSON: what the model's own steps say, and all stages."""
    from model_cards_runs import CASES, proof_of, subset_report

    import hfshrink
    from hfshrink.record import CompressionReport

    facts = CARDS[name]
    about = {"about": {"story": facts["story"], "data": facts["data"]}}
    if name not in CASES:
        report = kept(name, "report", subset_report)
        return {**report, "details": {**report["details"], **proof_of(report), **about}}
    case = CASES[name]()
    report = hfshrink.report(case.compressed)
    details = {n: facts[n] for n in ("license", "language", "tier") if n in facts} | about
    details["datasets"] = [data["data"] for data in facts["data"] if not data["use"].startswith("test")]
    for stage, make in zip(STAGES, (scores, sizes, times), strict=True):
        found = CompressionReport.from_dict(kept(name, stage, lambda make=make: make(case)))
        sides = {"base": report.base.merged(found.base), "compressed": report.compressed.merged(found.compressed)}
        details |= found.details
        report = dataclasses.replace(report, **sides)
    return dataclasses.replace(report, base_model=facts["start"], details={**report.details, **details}).to_dict()


def card_text(name, record):
    """A card, from nothing but its record and the facts of `CARDS`."""
    import hfshrink

    facts = CARDS[name]
    if "history" not in record:
        card = hfshrink.dataset_card(record, dataset_name=name, license=facts["license"], language=facts["language"])
    else:
        report = hfshrink.CompressionReport.from_dict(record)
        card = hfshrink.model_card(report, model_name=name, base_model=facts.get("base_model"))
    return card.content + _about(record["details"]["about"])


def _about(about):
    """A part behind the generated one, as people may write it into a card: where base and data come from."""
    from hfshrink.cards.rendering import plain, safe_table

    rows = [(data["data"], data["use"], data["licence"]) for data in about["data"]]
    made = "Measured and rendered by `make cards` (benchmarks/model_cards.py)."
    return (
        f"\n## Where it comes from\n\n{plain(about['story'], 1000)}\n\n"
        f"{safe_table(('data', 'used for', 'licence'), rows)}\n\n{made}\n"
    )


def smaller(image):
    """The same image with few colours: drawings need no more, and the repository keeps every version."""
    from PIL import Image

    with Image.open(image) as drawn:
        few = drawn.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(image, optimize=True)


def read(name):
    return json.loads((FOLDER / name / "record.json").read_text(encoding="utf-8"))


def write(name, record):
    """Plots, record and card."""
    import hfshrink
    from hfshrink.cards import write_plots

    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    if "history" in record:
        plots = write_plots(hfshrink.CompressionReport.from_dict(record), folder / "plots")
        for plot in plots:
            smaller(folder / plot["file"])
        record = {**record, "details": {**record["details"], "plots": plots}}
    text = json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    (folder / "record.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(card_text(name, record), encoding="utf-8")
    print(f"model_cards/{name}/README.md", flush=True)


def index_text(records):
    """The list of all cards: each with its score, its size and its time."""
    from hfshrink.terminal import table

    rows, subsets = [], []
    for name, record in records.items():
        link = f"[{name}]({name}/README.md)"
        if "history" not in record:
            kept, rows_of = f"{record['size']:,}", f"{record['rows']:,}"
            subsets.append(f"{link}: {kept} of {rows_of} rows, {record.get('used') or record['method']}.")
            continue
        sides = record["base"], record["compressed"]
        score, size, cpu = (
            " → ".join(texts)
            for texts in (
                [f"{side['scores'][0]['value']:.4f}" for side in sides],
                [f"{side['size_bytes'] / 1e6:.1f}" for side in sides],
                [f"{side['latency'][0]['cpu_ms']:.1f}" for side in sides],
            )
        )
        methods = ", ".join(f"{step['technique']} ({step['method']})" for step in record["history"])
        rows.append((link, methods, sides[0]["scores"][0]["metric"], score, size, cpu))
    header = ("card", "steps", "metric", "base → compressed", "file MB", "CPU ms, batch 1")
    head = "# Cards of real runs\n\nGenerated by `make cards` from the record beside each; nothing is typed by hand."
    return "\n\n".join([head, table(header, rows), *subsets]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(CARDS), default=list(CARDS), help="these cards only")
    parser.add_argument("--time", action="store_true", help="measure the times anew: for a quiet machine")
    parser.add_argument("--render", action="store_true", help="measure nothing: cards from the stored records")
    options = parser.parse_args()
    if not options.render:
        os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
        from common import be_quiet

        be_quiet()
    for name in options.only:
        if options.time:
            (ROOT / "runs" / "cards" / name / "times.json").unlink(missing_ok=True)
        write(name, read(name) if options.render else measure(name))
    stored = {name: read(name) for name in CARDS if (FOLDER / name / "record.json").is_file()}
    (FOLDER / "README.md").write_text(index_text(stored), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
