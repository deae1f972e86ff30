"""How many tokens --optimizer muon needs for the loss that a tuned AdamW reaches, on a local text and a small GPT-2.

    python benchmarks/recipe.py shards my_texts my_shards        # .jsonl, .txt or .parquet files of your own
    python benchmarks/recipe.py tune my_shards                   # each setting of both sides, alone
    python benchmarks/recipe.py scale my_shards                  # the best rate of each at 64, 128 and 256 channels
    python benchmarks/recipe.py compare my_shards --picture recipe.png    # the winners, in three seeds

The vocabulary is the first 2,047 of GPT-2's byte pairs, so that the embedding has about the share of the parameters
that it has in GPT-2 124M. Every run is a whole schedule, warm-up and decay, and reads the same batches in the same
order. AdamW may choose its rate, decay, initial weights, beta1 and the embedding's rate as freely as Muon. As many runs
at a time as there are cores, of one thread each.
"""

# ruff: noqa: E402

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, which has a hellaswag.py

import argparse
import itertools
import math
import multiprocessing
import os
import statistics
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

from support import readers
from support.files import prefetch
from support.tokens import PATTERN, tokenizer
from support.world import World
from train_gpt2 import GPT, GPTConfig, Sequences, TrainConfig, evaluate, make_optimizer, step_batches, train_step

CPU = World(0, 1, torch.device("cpu"), torch.float32)
VOCAB = 2048
BATCH, T = 2048, 128  # tokens in a step and in a sequence


class Side(NamedTuple):
    """A recipe."""

    optimizer: str
    max_lr: float
    embedding: float = 1.0  # its rate, in multiples of the others'
    decay: str = "linear"
    min_lr: float = 0.0  # a fraction of max_lr
    scaled: bool = True  # initial weights of 0.02 sqrt(768 / C), not 0.02
    zero_residual: bool = False
    weight_decay: float = 0.1
    embedding_decay: float = 0.0
    beta1: float = 0.9  # AdamW's


class Trial(NamedTuple):
    """A run of a recipe."""

    side: Side
    data_dir: str
    steps: int
    seed: int = 1
    channels: int = 64
    points: int = 1  # validations, evenly spaced, the last one at the end


# The best of `tune`. --demo is like MUON, but for the embedding's rate (x 2) and the weight decay (0.3).
ADAMW = Side("adamw", 4e-3, 8, embedding_decay=0.1, beta1=0.8)
CLASSIC = Side("adamw", 8e-3, 1, "cosine", 0.1, embedding_decay=0.1)  # GPT-3's, at its best rate here
MUON = Side("muon", 16e-3, 8, beta1=0.8, zero_residual=True)


def write_shards(texts: str, out_dir: str) -> None:
    """Shards of the texts in a folder, in GPT-2's encoding cut to its first VOCAB - 1 ranks."""
    ranks = {tokenizer().decode_single_token_bytes(i): i for i in range(VOCAB - 1)}
    cut = tiktoken.Encoding("cut", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": VOCAB - 1})
    tokens = []
    for path in sorted(Path(texts).iterdir()):
        for record, _ in readers.read_rows(path) if readers.find_reader(path.name)[0] else ():
            tokens += [VOCAB - 1, *cut.encode(record["text"], disallowed_special=())]
    Path(out_dir).mkdir()
    for i in range(len(tokens) // 400_000):
        name = f"cut_{'train' if i else 'val'}_{i:06d}.npy"
        np.save(Path(out_dir, name), np.array(tokens[400_000 * i : 400_000 * (i + 1)], dtype=np.uint16))
    print(f"{len(tokens):,} tokens, {len(set(tokens))} distinct")


def optimizer_of(side: Side, model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    """What make_optimizer() gives, but for the embeddings' rate and decay and beta1, which are the side's."""
    optimizer = make_optimizer(model, config)
    tables = {model.transformer.wte.weight, model.transformer.wpe.weight}
    if side.optimizer == "adamw":  # whose embeddings need a group of their own
        large, small = optimizer.param_groups
        others = [p for p in large["params"] if p not in tables]
        groups = [{"params": list(tables)}, {"params": others, "weight_decay": side.weight_decay}, small]
        optimizer = torch.optim.AdamW(groups, lr=config.max_lr, fused=True)
    for group in optimizer.param_groups:
        if group["params"][0] in tables:
            group["lr"], group["weight_decay"] = side.embedding * config.max_lr, side.embedding_decay
        if "betas" in group:
            group["betas"] = (side.beta1, 0.95)
    return optimizer


def run(trial: Trial) -> list[float]:
    """Train; the validation losses."""
    torch.set_num_threads(1)
    side, C, steps, points = trial.side, trial.channels, trial.steps, trial.points
    shape = GPTConfig(block_size=T, vocab_size=VOCAB, n_layer=4, n_head=C // 32, n_embd=C)
    config = TrainConfig(
        seed=trial.seed, max_steps=steps, warmup_steps=steps // 12, optimizer=side.optimizer, max_lr=side.max_lr,
        min_lr=side.min_lr * side.max_lr, decay=side.decay, weight_decay=side.weight_decay, batch_tokens=BATCH,
        micro_batch=BATCH // T, val_tokens=2**16,
    )  # fmt: skip
    data, val_data = (Sequences(trial.data_dir, split, T, range(VOCAB)) for split in ("train", "val"))
    model = GPT(shape, seed=None)
    model.init_weights(trial.seed, 0.02 * math.sqrt(768 / C) if side.scaled else 0.02, side.zero_residual)
    optimizer, losses = optimizer_of(side, model, config), []
    batches = prefetch(lambda step: step_batches(step, data, config, 0, 1), range(1, steps + 1))
    for step, batch in enumerate(batches, 1):
        train_step(model, optimizer, batch, step, config, CPU)
        if step * points // steps > (step - 1) * points // steps:
            losses.append(evaluate(model, val_data, config, CPU)[0])
    return losses


HEAD = """channels steps seed optimizer max_lr embedding's_rate embedding's_decay decay initial_weights beta1
weight_decay""".split()


def row(cells: list) -> str:
    return f"| {' | '.join(str(cell).replace('_', ' ') for cell in cells)} |"


def describe(trial: Trial) -> list[str]:
    """The cells of a trial's row in a table."""
    side = trial.side
    start = "0.02 sqrt(768 / C)" if side.scaled else "0.02"
    if side.zero_residual:
        start += ", residual projections 0"
    return [
        trial.channels, trial.steps, trial.seed, side.optimizer, f"{side.max_lr:.2g}", f"x {side.embedding:g}",
        side.embedding_decay, f"{side.decay} to {side.min_lr:g}", start, side.beta1, side.weight_decay,
    ]  # fmt: skip


def run_all(trials: list[Trial]) -> dict[Trial, list[float]]:
    """The losses of each trial, the last of which is printed as it comes."""
    losses = {}
    print(row([*HEAD, "loss"]))
    print(row(["---"] * (len(HEAD) + 1)), flush=True)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        for trial, found in zip(trials, pool.imap(run, trials), strict=True):
            losses[trial] = found
            print(row([*describe(trial), f"{found[-1]:.4f}"]), flush=True)
    return losses


def tune(args) -> None:
    """Each setting of the winners changed alone."""
    sides = []
    for best in (ADAMW, MUON):
        changes = [{"max_lr": factor * best.max_lr} for factor in (0.5, 2)]
        changes += [{"embedding": factor * best.embedding} for factor in (0.25, 0.5, 2)]
        changes += [{"beta1": beta1} for beta1 in (0.7, 0.9) if beta1 != best.beta1]
        changes += [{"weight_decay": decay} for decay in (0.05, 0.2)]
        changes += [{"decay": "cosine", "min_lr": 0.1}, {"scaled": False}, {"zero_residual": not best.zero_residual}]
        changes += [{"embedding_decay": 0.0 if best.embedding_decay else 0.1}]
        sides += [best, *(best._replace(**change) for change in changes)]
    run_all([Trial(side, args.data_dir, args.steps) for side in sides])


def scale(args) -> None:
    """The rates of each side at three widths."""
    trials = []
    for channels in (64, 128, 256):
        for best, factors in ((ADAMW, (2, 1, 0.5, 0.25)), (MUON, (0.5, 1, 2))):
            sides = [best._replace(max_lr=f * best.max_lr) for f in factors]
            trials += [Trial(side, args.data_dir, args.steps, channels=channels) for side in sides]
    run_all(trials)


def tokens_for(target: float, ends: dict[int, float]) -> float:
    """Tokens at which whole runs, {steps: loss}, reach a loss, between two of them by their logarithm; or NaN."""
    for (few, high), (many, low) in itertools.pairwise(sorted(ends.items())):
        if low <= target <= high:
            return BATCH * few * (many / few) ** ((high - target) / (high - low))
    return math.nan


def compare(args) -> None:
    """AdamW as tuned and in two lesser settings; Muon, in shorter runs too."""
    names = {
        CLASSIC._replace(max_lr=CLASSIC.max_lr / 3): "AdamW, classic recipe, a third of its best rate",
        ADAMW._replace(max_lr=ADAMW.max_lr / 3): "AdamW, tuned, a third of its best rate",
        ADAMW._replace(beta1=0.9): "AdamW, tuned, but with a beta1 of 0.9",
        ADAMW: "AdamW, tuned",
        MUON: "Muon",
    }
    trials = []
    for seed in range(1, args.seeds + 1):
        for side in names:
            percents = (*args.percent, 100) if side == MUON else (100,)
            lengths = [args.steps * percent // 100 for percent in percents]
            trials += [Trial(side, args.data_dir, steps, seed, points=10) for steps in lengths]
    losses = run_all(trials)
    print("\n| | seed | its loss | tokens | Muon's tokens for that loss | ratio |\n|---|---|---|---|---|---|")
    ratios: dict[str, list[float]] = {}
    for trial, found in losses.items():
        if trial.side != MUON:
            name, tokens = names[trial.side], BATCH * trial.steps
            ends = {t.steps: its[-1] for t, its in losses.items() if t.side == MUON and t.seed == trial.seed}
            needed = tokens_for(found[-1], ends)
            ratios.setdefault(name, []).append(needed / tokens)
            print(
                row([name, trial.seed, f"{found[-1]:.4f}", f"{tokens:,}", f"{needed:,.0f}", f"{needed / tokens:.3f}"])
            )
    for name, values in ratios.items():
        print(f"{name}: {statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    if args.picture:
        draw(losses, names, args)


def draw(losses: dict[Trial, list[float]], names: dict[Side, str], args) -> None:
    """Loss against tokens: the longest runs of the first seed as lines, the ends of Muon's shorter ones as dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = dict(zip(names, ("tab:gray", "tab:olive", "tab:green", "tab:blue", "tab:orange"), strict=True))
    dots = []
    for trial, found in losses.items():
        millions = [BATCH * trial.steps * (i + 1) / len(found) / 1e6 for i in range(len(found))]
        if trial.seed == 1 and trial.steps == args.steps:
            axes.plot(millions, found, color=colors[trial.side], label=names[trial.side])
        elif trial.steps < args.steps:
            dots.append((millions[-1], found[-1]))
    axes.plot(*np.array(dots).T, "o", color="tab:orange", markersize=4, label="Muon, whole runs of fewer tokens")
    target = statistics.mean(found[-1] for trial, found in losses.items() if trial.side == ADAMW)
    axes.axhline(target, color="tab:blue", linewidth=0.7, linestyle=":")
    axes.set(xlabel="million tokens", ylabel="validation loss, nats", ylim=(target - 0.3, target + 1.2))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(args.picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["shards", "tune", "scale", "compare"])
    parser.add_argument("data_dir", help="folder of the shards; for `shards` that of the texts")
    parser.add_argument("out_dir", nargs="?", help="for `shards`: a folder to make")
    parser.add_argument("--steps", type=int, default=600, help="of 2,048 tokens, in a full run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--percent", type=int, nargs="+", default=[20, 30, 40, 60, 75], help="of Muon's shorter runs")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if args.what == "shards":
        if not args.out_dir:
            parser.error("shards wants two folders: that of the texts and one to make")
        write_shards(args.data_dir, args.out_dir)
    else:
        {"tune": tune, "scale": scale, "compare": compare}[args.what](args)


if __name__ == "__main__":
    main()
