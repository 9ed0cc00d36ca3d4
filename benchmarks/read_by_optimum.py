"""Read an int8 export once with optimum-onnx 0.1.0, in a venv of its own (it needs transformers 4); compare logits.

Usage: python benchmarks/read_by_optimum.py FOLDER, where FOLDER is what `quantize(…, "onnx-int8")` wrote.
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from common import save

PACKAGES = ["optimum-onnx[onnxruntime]==0.1.0", "transformers<4.58", "torch==2.13.0"]
READ = """
import json, sys
from optimum.onnxruntime import ORTModelForSequenceClassification
from transformers import AutoTokenizer, __version__
model = ORTModelForSequenceClassification.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = tokenizer(json.loads(sys.argv[2]), padding=True, return_tensors="pt")
print(json.dumps({"transformers": __version__, "logits": model(**rows).logits.tolist()}))
"""
TEXTS = ["a good film", "the plot is thin and the jokes are old"]


def main(folder):
    from hfshrink import load

    with tempfile.TemporaryDirectory() as place:
        venv.create(place, with_pip=True)
        python = str(Path(place) / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        command = [python, "-c", READ, str(Path(folder).resolve()), json.dumps(TEXTS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        result = {"read": False, "error": done.stderr.strip().splitlines()[-1]}
        text = f"optimum-onnx 0.1.0 does not read the export: `{result['error']}`"
    else:
        theirs = json.loads(done.stdout.strip().splitlines()[-1])
        model, tokenizer = load(folder)
        ours = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.tolist()
        largest = max(
            abs(a - b) for x, y in zip(ours, theirs["logits"], strict=True) for a, b in zip(x, y, strict=True)
        )
        result = {"read": True, "transformers": theirs["transformers"], "max_difference": largest}
        text = (
            f"optimum-onnx 0.1.0 with transformers {theirs['transformers']} reads the int8 export; largest difference "
            f"of a logit to `ExportedModel`: {largest:.2g}."
        )
    save("read_by_optimum", result, text)


if __name__ == "__main__":
    main(sys.argv[1])
