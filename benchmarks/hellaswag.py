"""How fast hellaswag.py scores, beside the usual loop, on the same examples and weights in one run.

    python benchmarks/hellaswag.py

The weights are random, in the shape of GPT-2 124M, in float32; the examples are random tokens: contexts of 20 to 90,
endings of 5 to 40, each length as likely as another. Tokenizing, the same for both, is not in the times.

- loop: the usual script. One example at a time: its four texts, padded to the longest, in one forward pass; logits and
  cross-entropy at every position; the sum over those of the ending.
- hellaswag: the batches of hellaswag.HellaSwag and hellaswag.evaluate(), the making of the batches included.
"""

# ruff: noqa: E402

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, where Python would find this script

import argparse
import statistics
import time

import numpy as np
import torch
from torch.nn import functional as F

from hellaswag import Example, HellaSwag, evaluate
from support.world import World
from train_gpt2 import GPT, GPTConfig


def make_examples(n: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)

    def ids(shortest: int, longest: int) -> list[int]:
        return rng.integers(0, 50256, rng.integers(shortest, longest + 1)).tolist()

    return [Example(i, ids(20, 90), [ids(5, 40) for _ in range(4)], [1] * 4, int(rng.integers(4))) for i in range(n)]


def make_model() -> GPT:
    """Random weights that are not so small that all tokens are about as likely."""
    model = GPT(GPTConfig())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    return model


@torch.no_grad()
def loop(model: GPT, examples: list[Example]) -> np.ndarray:
    """The scores (n, 4), as the usual script finds them."""
    scores = []
    for example in examples:
        texts = [example.context + ending for ending in example.endings]
        tokens = torch.zeros(4, max(map(len, texts)), dtype=torch.int64)
        mask = torch.zeros(tokens.shape)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor(text)
            mask[row, len(example.context) : len(text)] = 1
        logits = model(tokens)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        scores.append(-(losses * mask[:, 1:]).sum(1).numpy())
    return np.array(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model, examples = make_model(), make_examples(args.examples)
    world = World(rank=0, size=1, device=torch.device("cpu"), dtype=torch.float32)
    sides = {
        "loop": lambda chosen: loop(model, chosen),
        "hellaswag": lambda chosen: evaluate(model, HellaSwag(chosen, "completion", model.config), world),
    }
    for side in sides.values():
        side(examples[:4])
    seconds, scores = {name: [] for name in sides}, {}
    for number in range(args.rounds):
        for name in sorted(sides, reverse=number % 2 == 1):
            began = time.perf_counter()
            scores[name] = sides[name](examples)
            seconds[name].append(time.perf_counter() - began)
    lengths = HellaSwag(examples, "completion", model.config).lengths
    same = all(
        (scores["loop"] / by).argmax(1).tolist() == (scores["hellaswag"] / by).argmax(1).tolist() for by in (1, lengths)
    )
    print(f"{args.examples} examples, {args.rounds} rounds, {torch.get_num_threads()} threads")
    print("| side | seconds, median (least to most) | examples/s |\n|---|---|---|")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        span = f"{min(values):.2f} to {max(values):.2f}"
        print(f"| {name} | {medians[name]:.2f} ({span}) | {args.examples / medians[name]:.2f} |")
    print(f"hellaswag is {medians['loop'] / medians['hellaswag']:.2f} times as fast")
    print(f"largest difference of scores: {np.abs(scores['loop'] - scores['hellaswag']).max():.1e}")
    print(f"predictions of acc and acc_norm: {'the same' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
