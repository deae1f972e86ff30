"""Does a GPU compute what a CPU does? Loss and gradient of a small GPT-2 beside float32 on the CPU.

    python benchmarks/gpu_arithmetic.py                  # on CUDA; a table, and status 1 if a row is too far off
    python benchmarks/gpu_arithmetic.py --device cpu     # the same without a GPU, for a look

Differences are relative: of the loss, and of the gradient as one vector. Without CUDA compiled bfloat16, which takes a
CPU minutes, is left out.
"""

# ruff: noqa: E402

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, which has a hellaswag.py

import argparse

import torch
from torch import Tensor

from support.world import World
from train_gpt2 import GPT, GPTConfig

SHAPE = GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=256)
ROWS = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]  # dtype, largest difference allowed


def make_model(masked: bool) -> GPT:
    model = GPT(SHAPE, seed=1)
    if masked:
        model.allow(range(0, model.config.n_vocab, 5))
    return model


def gradient(model: GPT, step_model, x: Tensor, y: Tensor, world: World) -> tuple[float, Tensor]:
    """The loss, and the gradient of all parameters as one vector on the CPU."""
    model.zero_grad()
    with world.autocast():
        loss = step_model(x.to(world.device), y.to(world.device))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    generator = torch.Generator().manual_seed(2)
    tokens = 5 * torch.randint(0, 10_000, (4, SHAPE.block_size + 1), generator=generator)  # none of them masked
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    reference = World(0, 1, torch.device("cpu"), torch.float32)
    too_far = 0
    print("| dtype | compiled | masked | loss | its difference | the gradient's | allowed | |")
    print("|---|---|---|---|---|---|---|---|")
    for masked in (False, True):
        model = make_model(masked)
        loss, expected = gradient(model, model, x, y, reference)
        for dtype, allowed in ROWS:
            world = World(0, 1, device, dtype)
            for compiled in (False, True) if device.type == "cuda" or dtype == torch.float32 else (False,):
                model = make_model(masked).to(device)
                step_model = torch.compile(model, dynamic=False) if compiled else model
                found, its = gradient(model, step_model, x, y, world)
                off = (abs(found - loss) / loss, ((its - expected).norm() / expected.norm()).item())
                verdict = "good" if max(off) <= allowed else "TOO FAR"
                too_far += verdict != "good"
                side = f"{dtype}".removeprefix("torch.") + f" | {compiled} | {masked}"
                print(f"| {side} | {found:.6f} | {off[0]:.1e} | {off[1]:.1e} | {allowed} | {verdict} |", flush=True)
    raise SystemExit(1 if too_far else 0)


if __name__ == "__main__":
    main()
