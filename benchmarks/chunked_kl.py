"""What computing a language model's losses in chunks saves: peak memory of one step, plain against chunked.

A step is the student's forward and backward of `LogitLoss` + cross-entropy on the labels, and the teacher's forward,
on one row of 2,048 tokens from a vocabulary of 49,152. Each variant runs in a fresh process. After a warm-up on a few
tokens, which makes the gradients, the kernel's high-water mark of resident memory is set back; the peak of the step
above the resident memory before it is what the step needs beside both models and the gradients. Time is CPU time.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from common import save

VOCABULARY, LENGTH = 49_152, 2_048
WIDTHS = {"student": 192, "teacher": 576}
VARIANTS = ("body", "plain", 512, 256, 128)
# glibc raises this threshold as it goes; blocks below it stay in the heap when freed and would count as used.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


def status(field):
    """A field of the process's memory status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def llama(width, seed):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def step(variant, student, teacher, ids):
    """One forward and backward; returns the losses."""
    import torch

    from hfshrink.distillation.losses.chunks import chunked_losses, run_without_logits
    from hfshrink.distillation.losses.logits import LogitLoss, loss_mask

    inputs = {"input_ids": ids, "labels": ids}
    loss, mask = LogitLoss(temperature=1.0), loss_mask(inputs, "causal_tokens")
    if variant == "plain":
        outputs = student(**inputs)
        with torch.no_grad():
            theirs = teacher(input_ids=ids)
        divergence = loss(outputs, theirs, head="causal_tokens", mask=mask, labels=ids)
        parts = {"labels": outputs.loss, "logits": divergence}
    else:
        lazy = run_without_logits(student, student, inputs)
        with torch.no_grad():
            theirs = run_without_logits(teacher, teacher, inputs)
        if variant == "body":  # everything but the logits
            parts = {"body": lazy.hidden.sum() + lazy.kept.sum()}
        else:
            parts = chunked_losses(lazy, theirs, labels=ids, mask=mask, losses=[loss], chunk_size=int(variant))
    sum(parts.values()).backward()
    return {name: value.item() for name, value in parts.items()}


def measure(variant):
    """Runs in the child: print what one step needs."""
    import torch

    torch.set_num_threads(1)
    student, teacher = (llama(width, seed) for seed, width in enumerate(WIDTHS.values()))
    teacher.requires_grad_(False).eval()
    ids = torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    step(variant, student, teacher, ids[:, :8])
    student.zero_grad(set_to_none=False)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    start = time.process_time()
    losses = step(variant, student, teacher, ids)
    seconds = time.process_time() - start
    norm = torch.stack([p.grad.double().norm() for p in student.parameters()]).norm().item()
    found = {"peak_memory_bytes": status("VmHWM") - before, "resident_bytes": before, "seconds": seconds}
    print(json.dumps({**found, "losses": losses, "gradient_norm": norm}))


def main(rounds=2):
    found = {}
    for variant in map(str, VARIANTS):
        runs = []
        for _ in range(rounds):
            command = [sys.executable, __file__, variant]
            child = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **MALLOC})
            runs.append(json.loads(child.stdout.splitlines()[-1]))
        highest = max(runs, key=lambda run: run["peak_memory_bytes"])
        found[variant] = {**highest, "seconds": min(run["seconds"] for run in runs)}
    report(found, rounds)


def report(found, rounds):
    from hfshrink.terminal import table

    plain, rows = found["plain"], []
    for name, run in found.items():
        label = {"body": "neither: bodies only", "plain": "plain"}.get(name, f"chunks of {name}")
        cells = [label, f"{run['peak_memory_bytes'] / 1e6:,.0f}", f"{run['seconds']:.1f}"]
        if name != "body":
            loss, norm = sum(run["losses"].values()), run["gradient_norm"]
            ratio = plain["peak_memory_bytes"] / run["peak_memory_bytes"]
            cells += [f"{ratio:.1f}x", f"{run['seconds'] / plain['seconds']:.2f}", f"{loss:.5f}", f"{norm:.5f}"]
        rows.append((*cells, *[""] * (7 - len(cells))))
    head = ("logits", "peak MB", "CPU s", "memory ÷", "CPU ×", "loss", "gradient norm")
    text = table(head, rows)
    text += (
        f"\n\nKL + cross-entropy, forward and backward, 1 × {LENGTH:,} tokens, vocabulary {VOCABULARY:,}, float32, 1 "
        f"thread; 2-layer Llamas with random weights, width {WIDTHS['student']} (student) and {WIDTHS['teacher']} "
        f"(teacher). Peak: high-water mark of resident memory during the step, less the resident memory before it "
        f"(both models and the gradients), the highest of {rounds} fresh processes; CPU time: the least. MB = 10⁶ B."
    )
    settings = {"vocabulary": VOCABULARY, "tokens": LENGTH, "widths": WIDTHS, "layers": 2, "rounds": rounds}
    save("chunked_kl", {"settings": settings, "variants": found}, text)


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
