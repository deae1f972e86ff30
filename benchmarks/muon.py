"""The update of --optimizer muon beside torch.optim.Muon's: how many kernels, and how long on this CPU.

    python benchmarks/muon.py        # some minutes

Kernels: the operators that reach the device for GPT-2 124M's 48 matrices, views aside; counted on the meta device.
Times: the matrices of the demo, and those 48, the sides in turns. torch's knows bfloat16 only, in which a CPU without
instructions for it takes minutes; it is timed in float32 too, and in bfloat16 for the demo alone.
"""

# ruff: noqa: E402

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, which has a hellaswag.py

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.muon import Muon
from train_gpt2 import DEMO

VIEWS = {"t", "transpose", "slice", "select", "view", "_unsafe_view", "expand", "detach", "alias", "as_strided"}
EMPTY = {"empty", "new_empty", "empty_like"}


class Count(TorchDispatchMode):
    """Counts operators; a _foreach one counts once, as it takes its tensors in a few kernels."""

    kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.removeprefix("aten::") not in VIEWS | EMPTY:
            self.kernels += 1
        return function(*args, **kwargs or {})


def matrices(layers: int, C: int, device: str) -> list[torch.nn.Parameter]:
    generator, made = torch.Generator().manual_seed(0), []
    for rows, columns in [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * layers:
        p = torch.nn.Parameter(torch.empty(rows, columns, device=device))
        p.grad = torch.randn(rows, columns, generator=generator).to(device)
        made.append(p)
    return made


def torchs(matrices: list, dtype: torch.dtype) -> Callable[[], None]:
    """torch.optim.Muon's step, its conversion to bfloat16 replaced by a copy for float32."""
    optimizer = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")

    def step() -> None:
        convert = torch.Tensor.bfloat16 if dtype == torch.bfloat16 else torch.Tensor.clone
        with mock.patch.object(torch.Tensor, "bfloat16", convert):
            optimizer.step()

    return step


def ours(matrices: list, dtype: torch.dtype) -> Callable[[], None]:
    table = torch.nn.Parameter(torch.zeros(1, 1, device=matrices[0].device))  # without a gradient: left alone
    return Muon(matrices, torch.optim.AdamW([table]), lr=1e-3, weight_decay=0.1, dtype=dtype).step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    sides = [
        ("torch.optim.Muon", torchs, torch.bfloat16),
        ("torch.optim.Muon", torchs, torch.float32),
        ("support/muon.py", ours, torch.bfloat16),
        ("support/muon.py", ours, torch.float32),
    ]
    kernels = []
    for _, make, dtype in sides:
        step = make(matrices(12, 768, "meta"), dtype)
        step()
        with Count() as count:
            step()
        kernels.append(count.kernels)
    columns = []
    for layers, C in ((DEMO["n_layer"], DEMO["n_embd"]), (12, 768)):
        steps = [make(matrices(layers, C, "cpu"), dtype) for _, make, dtype in sides]
        times: list[list[float]] = [[] for _ in steps]
        for _ in range(rounds + 1):
            for (_, _, dtype), step, its in zip(sides, steps, times, strict=True):
                if C == 64 or dtype == torch.float32:
                    began = time.perf_counter()
                    step()
                    its.append(1000 * (time.perf_counter() - began))
        columns.append([f"{statistics.median(its[1:]):,.1f}" if its else "-" for its in times])
    print("| | | kernels, GPT-2 124M | ms, the demo's 16 matrices | ms, GPT-2 124M's 48 |\n|---|---|---|---|---|")
    for (name, _, dtype), *row in zip(sides, kernels, *columns, strict=True):
        print(f"| {name} | {str(dtype).removeprefix('torch.')} | {row[0]:,} | {row[1]} | {row[2]} |")


if __name__ == "__main__":
    main()
