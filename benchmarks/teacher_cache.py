"""What a cached teacher saves, and what its sparse form costs.

1. An epoch of `DistillationTrainer` with the teacher running, and with its cached logits: interleaved, medians.
2. SmolLM2's distribution kept at equal bytes per position: as random draws (RSKD, arXiv:2503.16870), as the largest
   probabilities with one bucket for the rest, or as the largest scaled to 1. How far is the gradient on a student's
   logits from that of the full logits, at a single position and summed over all positions?

`python benchmarks/teacher_cache.py`; with the word `quick` both on a few rows and a random small Llama, nothing saved.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import paired_interval, save, timing_arguments

BUDGETS = (13, 25, 37, 73, 145)  # bytes per position
BATCH = 32


def encoded_reviews(tokenizer, count):
    import assets

    rows = assets.movie_reviews()["train"].select(range(count)).rename_column("label", "labels")
    return rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=64), remove_columns="text")


def make_trainer(student, rows, tokenizer, **kwargs):

    import hfshrink

    args = timing_arguments(tempfile.mkdtemp(), BATCH, use_cpu=True)
    return hfshrink.DistillationTrainer(student, args, train_dataset=rows, processing_class=tokenizer, **kwargs)


def epoch_speed(count=640, rounds=7):
    """Seconds of an epoch, with the teacher running and with its answers cached; and what the cache costs."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import assets
    import hfshrink
    from hfshrink.distillation.teachers.cache import cache_teacher

    teacher = AutoModelForSequenceClassification.from_pretrained(assets.minilm()).eval()
    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    student = hfshrink.make_student(teacher, num_layers=3)
    rows = encoded_reviews(tokenizer, count)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cached = cache_teacher(rows, teacher, tokenizer, cache_dir=folder, batch_size=BATCH)
        making = time.perf_counter() - start
        start = time.perf_counter()
        cache_teacher(rows, teacher, tokenizer, cache_dir=folder, batch_size=BATCH)
        reading = time.perf_counter() - start
        stored = sum(path.stat().st_size for path in Path(folder).glob("shard-*"))
        trainers = {
            "teacher runs": make_trainer(student, rows, tokenizer, teacher=teacher),
            "teacher cached": make_trainer(student, cached, tokenizer),
        }
        times = {name: [] for name in trainers}
        for number in range(rounds + 1):
            for name, trainer in trainers.items():
                wall, cpu = time.perf_counter(), time.process_time()
                trainer.train()
                if number:  # the first round warms up
                    times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    ratios = [
        [a[i] / b[i] for a, b in zip(times["teacher runs"], times["teacher cached"], strict=True)] for i in (0, 1)
    ]
    return {
        "rows": count,
        "rounds": rounds,
        "seconds": times,
        "wall_ratio": [min(ratios[0]), statistics.median(ratios[0]), max(ratios[0])],
        "cpu_ratio": [min(ratios[1]), statistics.median(ratios[1]), max(ratios[1])],
        "making_seconds": making,
        "reading_seconds": reading,
        "bytes_per_example": stored / count,
    }


def language_model(quick):
    """A teacher and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import assets

    if not quick:
        folder = assets.smollm2()
        return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).eval()
    teacher.lm_head.weight.data *= 40  # a peaked distribution, as a trained model has
    return teacher, tokenizer


def logits_on_text(models, tokenizer, positions, length=128):
    """Logits (positions, classes) of each model on the same text."""
    import assets

    text = "\n".join(assets.movie_reviews()["test"]["text"][: positions // 4])
    ids = torch.tensor(tokenizer(text, truncation=False, verbose=False)["input_ids"])
    ids = ids[: positions // length * length].reshape(-1, length)
    with torch.no_grad():
        return [torch.cat([model(row[None]).logits[0] for row in ids]).float() for model in models]


def gradient(student, targets):
    """The loss's derivative by the logits of each position, (positions, classes)."""
    from hfshrink.distillation.losses.divergences import sparse_kl_divergence

    leaf = student.clone().requires_grad_()
    sparse_kl_divergence(leaf, targets).backward()
    return leaf.grad * len(leaf)


def as_targets(row, tail, scale=False):
    """The stored parts of all positions as padded tensors, numbers rounded as they are stored."""
    from hfshrink.distillation.losses.divergences import SparseTargets

    used = torch.arange(int(row["widths"].max())) < torch.as_tensor(row["widths"])[:, None]
    values = row["counts"] / row["counts"].sum() if "counts" in row else row["probabilities"].astype(np.float16)
    ids, p = torch.zeros(used.shape, dtype=torch.long), torch.zeros(used.shape)
    ids[used], p[used] = torch.as_tensor(row["ids"]), torch.as_tensor(np.asarray(values, np.float32))
    total = p.sum(-1, keepdim=True)
    return SparseTargets(ids, p / total if "counts" in row or scale else p / total.clamp(min=1.0), tail=tail)


def distances(found, full):
    """Per position: relative L2 and angle in degrees; and both again for the sum over all positions."""

    def both(a, b):
        relative = (a - b).norm(dim=-1) / b.norm(dim=-1)
        cosine = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
        return relative.tolist(), torch.rad2deg(torch.arccos(cosine.clamp(-1, 1))).tolist()

    return (*both(found, full), *both(found.sum(0), full.sum(0)))


def draws_for(teacher, budget):
    """The number of draws that fills a budget: 3 bytes for each different id and one for their number."""
    from hfshrink.distillation.teachers.answers import sample_entries

    def size(draws):
        return 1 + 3 * sample_entries(teacher[::4], draws, torch.Generator().manual_seed(0))["widths"].mean()

    low, high = 1, 255
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= budget else (low, middle - 1)
    return low


def gradients(quick, positions=512, seeds=5):
    """The distances of each method at each budget."""
    import hfshrink
    from hfshrink.distillation.teachers.answers import sample_entries, top_entries

    model, tokenizer = language_model(quick)
    small = hfshrink.make_student(model, num_layers=max(1, model.config.num_hidden_layers * 2 // 3))
    teacher, student = logits_on_text((model, small), tokenizer, positions)
    full = student.softmax(-1) - teacher.softmax(-1)
    results = []
    for budget in BUDGETS:
        draws, k = draws_for(teacher, budget), max(1, (budget - 1) // 4)
        rows = [sample_entries(teacher, draws, torch.Generator().manual_seed(seed)) for seed in range(seeds)]
        found = {"draws": [distances(gradient(student, as_targets(row, tail=False)), full) for row in rows]}
        top = top_entries(teacher, k)
        found["largest + rest"] = [distances(gradient(student, as_targets(top, tail=True)), full)]
        found["largest, scaled"] = [distances(gradient(student, as_targets(top, tail=False, scale=True)), full)]
        spent = 1 + 3 * statistics.fmean(row["widths"].mean() for row in rows)
        results.append(summarized(budget, found, {"draws": draws, "k": k, "bytes_of_draws": spent}))
    return {"model": type(model).__name__, "positions": len(teacher), "seeds": seeds, "budgets": results}


def summarized(budget, found, facts):
    """Means over seeds and positions, and the draws' difference to the largest + rest with a 95 % interval."""
    rows = {}
    for name, runs in found.items():
        rows[name] = {
            "relative_l2": float(np.mean([run[0] for run in runs])),
            "degrees": float(np.mean([run[1] for run in runs])),
            "relative_l2_of_sum": [float(np.mean([run[2] for run in runs])), spread([run[2] for run in runs])],
            "degrees_of_sum": [float(np.mean([run[3] for run in runs])), spread([run[3] for run in runs])],
        }
    top = np.array([found["largest + rest"][0][1]] * len(found["draws"]))
    difference = paired_interval(top, np.array([run[1] for run in found["draws"]]), resamples=1000)
    return {"budget": budget, **facts, "methods": rows, "degrees_draws_minus_largest": difference}


def spread(values):
    """Half of a 95 % interval of the mean over seeds; 0 for what is not random."""
    return 0.0 if len(values) < 2 else 1.96 * statistics.stdev(values) / len(values) ** 0.5


def report(speed, sparse):
    from hfshrink.terminal import table

    median = {
        name: [statistics.median(t[i] for t in found) for i in (0, 1)] for name, found in speed["seconds"].items()
    }
    lines = [(name, f"{wall:.2f}", f"{cpu:.2f}") for name, (wall, cpu) in median.items()]
    for place, name in ((0, "wall"), (1, "cpu")):
        low, middle, high = speed[f"{name}_ratio"]
        lines.append(
            (f"{name} ratio", *(f"{middle:.2f} ({low:.2f}–{high:.2f})" if i == place else "" for i in (0, 1)))
        )
    saved = median["teacher runs"][0] - median["teacher cached"][0]
    text = table(("epoch", "wall s", "CPU s"), lines) + (
        f"\n\nMiniLM-L6 teacher, 3-layer student, {speed['rows']} reviews, batch {BATCH}; medians (and range) of "
        f"{speed['rounds']} interleaved epochs. Making the cache: {speed['making_seconds']:.2f} s, "
        f"{speed['making_seconds'] / saved:.1f} epochs' saving; reading it: {speed['reading_seconds']:.2f} s; "
        f"{speed['bytes_per_example']:.0f} bytes an example.\n\n"
    )
    rows = []
    for result in sparse["budgets"]:
        for name, found in result["methods"].items():
            kept = f"{result['draws']} draws" if name == "draws" else f"k = {result['k']}"
            size = result["bytes_of_draws"] if name == "draws" else 1 + 4 * result["k"]
            (l2, l2_spread), (angle, angle_spread) = found["relative_l2_of_sum"], found["degrees_of_sum"]
            one = (f"{found['relative_l2']:.3f}", f"{found['degrees']:.1f}°")
            rows.append(
                (f"{size:.0f}", name, kept, *one, f"{l2:.3f} ± {l2_spread:.3f}", f"{angle:.1f} ± {angle_spread:.1f}°")
            )
    text += table(("bytes", "kept", "how many", "L2 of one", "angle of one", "L2 of sum", "angle of sum"), rows)
    text += (
        f"\n\n{sparse['model']}, its student with a third of the layers dropped, {sparse['positions']} positions of "
        f"reviews, {sparse['seeds']} seeds. Distance of the gradient on the student's logits to that of the full "
        "logits: relative L2 and angle, mean over positions (one) and of the sum over all positions (sum, ± 95 % over "
        f"seeds). {verdict(sparse['budgets'])}"
    )
    return text


def verdict(results):
    """Who is nearer, at a single position and in the sum."""
    single = [result["degrees_draws_minus_largest"] for result in results]
    said = []
    for result, (_, low, high) in zip(results, single, strict=True):
        methods = result["methods"]
        one = "draws" if high < 0 else "largest + rest" if low > 0 else "neither"
        (drawn, spread_), (top, _) = methods["draws"]["degrees_of_sum"], methods["largest + rest"]["degrees_of_sum"]
        both = "neither" if abs(drawn - top) <= spread_ else "draws" if drawn < top else "largest + rest"
        said.append(f"{result['budget']} bytes: {one} at one position, {both} in the sum")
    return "Smaller angle: " + "; ".join(said) + "."


def main(quick=False):
    torch.set_num_threads(2)
    speed = epoch_speed(64, 1) if quick else epoch_speed()
    sparse = gradients(quick, **({"positions": 128, "seeds": 2} if quick else {}))
    text = report(speed, sparse)
    if quick:
        print(text)
    else:
        save("teacher_cache", {"epoch": speed, "gradients": sparse}, text)


if __name__ == "__main__":
    main("quick" in sys.argv[1:])
