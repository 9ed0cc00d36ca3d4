"""Rows that nobody wrote, for students of the movie reviews: words replaced in real rows, and texts without real rows.

Neither has labels of its own: the teacher's answers are all that is learned from them.
"""

from functools import cache

import datasets
import distillation_data as data
from common import ROOT
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import assets
from hfshrink.distillation import augment, generate_texts

FOLDER = ROOT / "runs" / "distillation" / "made"
TEXTS = 800  # a language model writes about three a second on two cores
AUGMENTED = 500  # rows whose words are replaced, four new rows of each
PROMPTS = (
    "A movie critic praises a film in one sentence: The movie is",
    "A movie critic pans a film in one sentence: The movie is",
    "From a review of a great film: It is",
    "From a review of a terrible film: It is",
    "The verdict of the reviewer on the acting, the script and the director:",
    "A short, witty line from a newspaper's film review:",
)


@cache
def augmented_reviews():
    """The labelled rows, and some of them with other words (label -100)."""
    rows = assets.movie_reviews(train=3000)["train"]
    few = rows.select(range(AUGMENTED))

    def make():
        new = augment(few, _masked_reviewer(), copies=4, candidates=10)
        made_up = new.select(range(len(few), len(new)))
        return datasets.concatenate_datasets([rows.cast(made_up.features), made_up])

    more = _kept("augmented", make)
    encoded = data.encoded_texts(more.select_columns(["text", "label"]), 64).rename_column("label", "labels")
    return encoded.cast_column("labels", datasets.Value("int64"))


@cache
def generated_reviews():
    """Texts that SmolLM2 wrote: no real row is used."""

    def write():
        folder = assets.smollm2()
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        return generate_texts(model, TEXTS, tokenizer, prompts=PROMPTS, max_new_tokens=28, batch_size=64)

    return data.encoded_texts(_kept("generated", write).select_columns(["text"]), 64)


def _kept(name, make):
    """A data set that is made once, and read back ever after."""
    folder = FOLDER / name
    if not (folder / "state.json").is_file():
        make().save_to_disk(folder)
    return datasets.load_from_disk(str(folder))


def _masked_reviewer(steps=200):
    """MiniLM as a masked language model: it comes without that head, which learns from the labelled rows' texts."""
    folder, tokenizer = FOLDER / "masked-lm", data.tokenizer_of_minilm()
    if not (folder / "model.safetensors").is_file():
        set_seed(0)
        model = BertForMaskedLM.from_pretrained(assets.minilm())
        args = TrainingArguments(
            output_dir=str(ROOT / "runs" / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=2e-4,
            train_sampling_strategy="group_by_length",
            warmup_steps=0.1,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        rows = data.movie().rows["train"].remove_columns("labels")
        trainer = Trainer(model, args, train_dataset=rows, data_collator=DataCollatorForLanguageModeling(tokenizer))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)
