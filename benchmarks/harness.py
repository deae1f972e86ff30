"""Whether `hellaswag.py --style harness` agrees with lm-evaluation-harness itself, ending by ending.

    python3 -m venv .harness && .harness/bin/pip install -r requirements.txt "lm_eval[hf]==0.4.13"
    .harness/bin/python benchmarks/harness.py                      # rows made of pieces that the preparation changes
    .harness/bin/python benchmarks/harness.py --data rows.jsonl    # other rows

The harness takes its own hellaswag task, preparation and scoring, over the same file, through `transformers` and its
fast tokenizer, here one made from assets/gpt2.tiktoken. Both score with the same random GPT-2 in float32. No network.
"""

# ruff: noqa: E402

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, which has a hellaswag.py

import argparse
import json
import random
import tempfile

import lm_eval
import numpy as np
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from hellaswag import HellaSwag, evaluate, read_examples
from support.tokens import PATTERN, RANKS_FILE
from support.world import World
from train_gpt2 import GPT

PIECES = [
    "A man", "is SEEN", "on the roof.", "[title] How to", "[header] Rest", "[step]", "  two spaces", "café", "世界",
    "😀", "it's", "1,000", "and then,", "[substeps] [title]", "] [", "\n", "don't [x] stop", "...", "ÉLAN", "\u00a0",
    "ß",
]  # fmt: skip


def make_rows(n: int) -> list[dict]:
    rng = random.Random(0)

    def text(shortest: int, longest: int) -> str:
        return " ".join(rng.choice(PIECES) for _ in range(rng.randint(shortest, longest)))

    rows = []
    for i in range(n):
        a, b = text(1, 60 if i % 20 == 0 else 12), rng.choice(["", text(1, 4)])
        endings = [text(0, 6) + rng.choice([" x", "[y] z.", " w [v]"]) for _ in range(4)]
        row = {"activity_label": text(1, 2), "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}", "endings": endings}
        rows.append(row | {"label": str(rng.randrange(4))})
    return rows


def run_harness(model: GPT2LMHeadModel, data: Path, folder: Path) -> dict:
    special = "<|endoftext|>"
    tokenizer = TikTokenConverter(str(RANKS_FILE), pattern=PATTERN, extra_special_tokens=[special]).converted()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special, eos_token=special)
    task = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / "hellaswag" / "hellaswag.yaml"),
        "task": "hellaswag_local",
        "dataset_path": "parquet" if data.suffix == ".parquet" else "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "training_split": None,
    }
    (folder / "hellaswag_local.yaml").write_text(yaml.safe_dump(task))
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu"),
        tasks=["hellaswag_local"],
        task_manager=TaskManager(include_path=str(folder)),
        log_samples=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a .jsonl or .parquet file with the fields of Rowan/hellaswag")
    args = parser.parse_args()
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=128, n_embd=96, n_layer=2, n_head=4)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))  # far from uniform
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = args.data or folder / "rows.jsonl"
        if not args.data:
            data.write_text("".join(json.dumps(row) + "\n" for row in make_rows(500)))
        theirs.save_pretrained(folder / "model")
        model = GPT.from_pretrained(str(folder / "model"))
        examples = HellaSwag(read_examples(str(data), "harness"), "harness", model.config)
        scores = evaluate(model, examples, World(0, 1, torch.device("cpu"), torch.float32))
        found = run_harness(theirs, data, folder)
    ours, harness = examples.summary(scores), found["results"]["hellaswag_local"]
    samples = sorted(found["samples"]["hellaswag_local"], key=lambda sample: sample["doc_id"])
    expected = np.array([[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples])
    norms = examples.normalized(scores).argmax(1) == examples.labels
    disagree = sum(bool(sample["acc_norm"]) != bool(mine) for sample, mine in zip(samples, norms, strict=True))
    print(f"{len(samples)} examples, lm_eval {lm_eval.__version__}\n| | hellaswag.py | lm_eval |\n|---|---|---|")
    for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"):
        print(f"| {name} | {ours[name]:.6f} | {harness[f'{name},none']:.6f} |")
    print(
        f"largest difference of the scores: {np.abs(scores - expected).max():.1e} of {np.abs(expected).max():.0f} nats"
    )
    print(f"examples whose acc_norm differs: {disagree}")


if __name__ == "__main__":
    main()
