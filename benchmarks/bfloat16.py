"""Does training in bfloat16 lose anything by a residual stream in bfloat16, and by the loss of support/loss.py?

    python benchmarks/recipe.py shards my_texts my_shards
    python benchmarks/bfloat16.py my_shards --picture bfloat16.png     # ten minutes on CPUs without bfloat16

Two runs under autocast on a CPU, from the same weights and on the same batches: train_gpt2.py as it is, and with a
float32 residual stream and F.cross_entropy. 64 channels, 4 layers, 2,048 tokens a step.
"""

# ruff: noqa: E402

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, which has a hellaswag.py

import argparse
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from support.loss import CrossEntropySum
from support.world import World
from train_gpt2 import GPT, GPTConfig, Sequences, TrainConfig, evaluate, make_optimizer, step_batches, train_step

CPU = World(0, 1, torch.device("cpu"), torch.bfloat16)
SHAPE = GPTConfig(block_size=128, vocab_size=2048, n_layer=4, n_head=2, n_embd=64)


def wide_hidden(model: GPT, tokens: Tensor, *_) -> Tensor:
    """GPT.hidden() with its residual stream in float32."""
    x = model.transformer.wte(tokens) + model.transformer.wpe(torch.arange(tokens.size(1)))
    for block in model.transformer.h:
        x = block(x)
    return model.transformer.ln_f(x)


def wide_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def train(data_dir: str, steps: int) -> tuple[list[float], float]:
    """The loss of each step, and the validation loss at the end."""
    config = TrainConfig(
        max_steps=steps, warmup_steps=steps // 10, max_lr=4e-3, min_lr=0.0, decay="linear", batch_tokens=2048,
        micro_batch=16, val_tokens=2**16, seed=1,
    )  # fmt: skip
    data, val_data = (Sequences(data_dir, split, 128, range(2048)) for split in ("train", "val"))
    model = GPT(SHAPE, seed=None)
    model.init_weights(config.seed, std=0.07)
    optimizer, losses = make_optimizer(model, config), []
    for step in range(1, steps + 1):
        losses.append(train_step(model, optimizer, step_batches(step, data, config, 0, 1), step, config, CPU)[0])
    return losses, evaluate(model, val_data, config, World(0, 1, CPU.device, torch.float32))[0]


def draw(ours: list[float], wide: list[float], picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    losses.plot(wide, color="tab:gray", linewidth=3, alpha=0.5, label="float32 residual stream, F.cross_entropy")
    losses.plot(ours, color="tab:blue", linewidth=1, label="bfloat16, as it is")
    losses.set(ylabel="batch loss, nats")
    losses.legend(frameon=False)
    differences.plot([a - b for a, b in zip(ours, wide, strict=True)], color="tab:blue", linewidth=1)
    differences.set(xlabel="step", ylabel="difference", ylim=(-0.01, 0.01))
    for axis in (losses, differences):
        axis.grid(alpha=0.3)
    figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ours, loss = train(args.data_dir, args.steps)
    with mock.patch.object(GPT, "hidden", wide_hidden), mock.patch.object(CrossEntropySum, "apply", wide_loss):
        wide, wide_end = train(args.data_dir, args.steps)
    largest = max(abs(a - b) for a, b in zip(ours, wide, strict=True))
    print("| | batch loss, last step | validation loss |\n|---|---|---|")
    print(
        f"| as it is | {ours[-1]:.5f} | {loss:.5f} |\n| float32 stream and logits | {wide[-1]:.5f} | {wide_end:.5f} |"
    )
    print(f"largest difference of a step's losses: {largest:.5f}")
    if args.picture:
        draw(ours, wide, args.picture)


if __name__ == "__main__":
    main()
