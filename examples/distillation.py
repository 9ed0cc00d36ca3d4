"""Some ways to use a teacher on one student, on a few movie reviews: shows the calls, not how well they do.

`.venv/bin/python examples/distillation.py` takes about two minutes on 2 cores. The measured comparison is
benchmarks/distillation.py.
"""

import tempfile

import datasets
import transformers

import assets
import hfshrink
from hfshrink import HiddenLoss, LogitLoss, RelationLoss, distill, make_student

QUICK = {"num_train_epochs": 1, "learning_rate": 2e-4, "seed": 0}


def fine_tuned_teacher(rows):
    """MiniLM-L6 on 600 reviews; `distill` without any weight on a teacher is plain fine-tuning."""
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(assets.minilm(), **names)
    return distill(model, model_copy(model), rows, losses=[LogitLoss(weight=0.0)], label_weight=1.0, **QUICK)


def model_copy(model):
    return make_student(model, num_layers=model.config.num_hidden_layers)


def main():
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    reviews = assets.movie_reviews()
    rows, unlabelled = reviews["train"].select(range(600)), reviews["unlabelled"].select(range(600))
    test = reviews["test"].select(range(400))
    teacher = fine_tuned_teacher(rows)
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "soft labels": {"losses": [LogitLoss(temperature=2.0)]},
            "and relations inside": {"losses": [LogitLoss(), RelationLoss()]},
            "and hidden states": {"losses": [LogitLoss(), HiddenLoss()]},
            "soft labels, cached on disk": {"teacher_cache": folder},
        }
        for name, how in ways.items():
            student = distill(make_student(teacher, num_layers=2), teacher, rows, **how, **QUICK)
            print(f"{name}: {hfshrink.evaluate(student, test, 'accuracy').scores[0]}")
        student = distill(make_student(teacher, num_layers=2), teacher, unlabelled, **QUICK)
        print(f"rows without labels: {hfshrink.evaluate(student, test, 'accuracy').scores[0]}")
    print(hfshrink.report(student))


if __name__ == "__main__":
    main()
