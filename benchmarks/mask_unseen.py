"""What --mask_unseen costs: a training step with it and without it, interleaved, in one process.

    python benchmarks/mask_unseen.py

- demo: the step of --demo on a CPU, eager; the tokens of its corpus are 10,000 or so of 50,257, and the head shrinks.
- compiled: the same step under torch.compile, in which, as on a GPU, the mask is a bias of the logits, with it or not.
- 124m: GPT-2 124M, two sequences of 1,024 tokens, eager, and all tokens but 257 occur: the head hardly shrinks.

The tokens are random among those that occur. Forward, backward, clipping and optimiser are in the times.
"""

# ruff: noqa: E402

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, which has a hellaswag.py

import argparse
import statistics
import time

import torch

from fineweb import demo_documents
from support.tokens import encode_document
from support.world import World
from train_gpt2 import DEMO, GPT, GPTConfig, TrainConfig, make_optimizer, train_step

CPU = World(0, 1, torch.device("cpu"), torch.float32)


def make_side(shape: GPTConfig, token_ids: list[int] | None, compile: bool, batches: list):
    """A function that trains one step and returns its seconds."""
    optimizer = DEMO["optimizer"] if shape.n_embd == DEMO["n_embd"] else "adamw"
    model, config = GPT(shape), TrainConfig(compile=compile, optimizer=optimizer)
    if token_ids:
        model.allow(token_ids)
    optimizer = make_optimizer(model, config)
    step_model = torch.compile(model, dynamic=False) if compile else model

    def step() -> float:
        began = time.perf_counter()
        train_step(step_model, optimizer, batches, 1, config, CPU)
        return time.perf_counter() - began

    return step


def measure(
    name: str, shape: GPTConfig, token_ids: list[int], sequences: list[int], compile: bool, rounds: int
) -> None:
    generator, ids = torch.Generator().manual_seed(0), torch.tensor(token_ids)
    batches = []
    for n in sequences:
        rows = ids[torch.randint(len(ids), (n, shape.block_size + 1), generator=generator)]
        batches.append((rows[:, :-1].contiguous(), rows[:, 1:].contiguous()))
    sides = [make_side(shape, chosen, compile, batches) for chosen in (None, token_ids)]
    times = [[], []]
    for i in range(rounds + 2):
        for side, seconds in zip(sides, times, strict=True):
            seconds.append(side())
            if i < 2:  # to warm up
                seconds.clear()
    without, masked = (statistics.median(seconds) for seconds in times)
    least, most = (f(b / a for a, b in zip(*times, strict=True)) for f in (min, max))
    print(
        f"| {name} | {len(token_ids):,} | {1000 * without:.1f} | {1000 * masked:.1f} | "
        f"{masked / without:.3f} ({least:.3f} to {most:.3f}) |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="of demo and compiled; a third as many of 124m")
    rounds = parser.parse_args().rounds
    seen = sorted({int(token) for text in demo_documents() for token in encode_document(text)})
    demo = GPTConfig(**{name: DEMO[name] for name in ("block_size", "n_layer", "n_head", "n_embd")})
    print("| step | tokens allowed | ms without | ms with | ratio of medians (least to most of the pairs) |")
    print("|---|---|---|---|---|")
    measure("demo", demo, seen, [8, 8], False, rounds)
    measure("compiled", demo, seen, [8, 8], True, rounds)
    measure("124m", GPTConfig(), list(range(50_000)), [2], False, max(1, rounds // 3))


if __name__ == "__main__":
    main()
