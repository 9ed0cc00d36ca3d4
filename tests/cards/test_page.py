"""The page on cards: its snippets run."""

import re
from pathlib import Path

import pytest
from datasets import Dataset

import tiny
from hfshrink import make_student, model_card

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cards.md"


@pytest.mark.slow
def test_the_snippets_of_the_page_run_from_top_to_bottom():
    base = tiny.model("bert", max_position_embeddings=130)  # profile times rows of 128 tokens
    for model, folder in ((base, "base"), (make_student(base, num_layers=1), "path/to/small")):
        model.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    rows = Dataset.from_dict({"text": ["a good film", "a bad film"] * 4, "label": [1, 0] * 4})
    names = {"base": "base", "small": "path/to/small", "test": rows}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) == 2
    assert 'from_pretrained("me/small")' in Path("path/to/small/README.md").read_text(encoding="utf-8")
    text = model_card("path/to/small").content
    assert re.search(r"\| accuracy \(8 rows\) +\| [01]\.\d{4} ", text)
    assert re.search(r"\| same answer as the base \(8 rows, paired\) +\|", text)
    assert "not measured | not measured" not in text
