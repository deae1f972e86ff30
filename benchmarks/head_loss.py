"""Ways to form the head's loss and its gradient on a CPU, in one process, in turns: why HeadLoss is as it is.

    python benchmarks/head_loss.py                  # 1,024 rows of 64 channels over 50,257 tokens, as in the demo
    python benchmarks/head_loss.py --channels 768   # as in GPT-2 124M

Each way but the first takes a few rows of logits at a time, through one buffer, and forms the gradient on the way. It
is compared with F.cross_entropy() on one product, loss and gradients.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, which has a hellaswag.py

import argparse  # noqa: E402
import math  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from support import cpu  # noqa: E402

N, V = 1024, 50257


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = F.cross_entropy(F.linear(x, weight), targets)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


def chunked(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: int,
    width: int = V,
    exp2: bool = True,
    maximum: bool = True,
    kept: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rows` of logits at a time, `width` floats apart; width 0 puts the weights on the left, a column for a row.

    What is `kept` is the buffer, from one call to the next.
    """
    unit, left = math.log(2) if exp2 else 1.0, width == 0
    loss, dx, dweight = x.new_zeros(()), torch.empty_like(x), torch.zeros_like(weight)
    size = (V, rows) if left else (rows, width)
    memory = cpu.scratch(*size, 0) if kept else torch.empty(size)
    buffer = memory if left else memory[:, :V]
    for x_rows, dx_rows, target in zip(x.split(rows), dx.split(rows), targets.split(rows), strict=True):
        if left:
            logits, index, dim = torch.mm(weight, x_rows.T / unit, out=buffer), target[None], 0
        else:
            logits, index, dim = torch.mm(x_rows / unit, weight.T, out=buffer), target[:, None], 1
        wanted = logits.gather(dim, index)
        largest = logits.amax(dim, keepdim=True) if maximum else 0.0
        if maximum:
            logits.sub_(largest)
        exps = logits.exp2_() if exp2 else logits.exp_()
        total = exps.sum(dim, keepdim=True)
        loss += ((total.log2() if exp2 else total.log()) + largest - wanted).sum() * unit
        exps = exps.T if left else exps
        torch.mm(exps, weight, out=dx_rows).div_(total.view(-1, 1)).sub_(weight[target])
        dweight.addmm_(exps.T, x_rows / total.view(-1, 1))
    dweight.index_add_(0, targets, x, alpha=-1)
    return loss / N, dx.div_(N), dweight.div_(N)


WAYS = {
    "one product, F.cross_entropy": None,
    "weights on the left, 128 rows, exp": {"rows": 128, "width": 0, "exp2": False},
    "128 rows, 50,257 apart, exp": {"rows": 128, "exp2": False},
    "128 rows, 50,304 apart, exp": {"rows": 128, "width": 50304, "exp2": False},
    "128 rows, 50,304 apart, exp2": {"rows": 128, "width": 50304},
    "256 rows, 50,304 apart, exp2": {"rows": 256, "width": 50304},
    "the same, in a buffer that is kept: HeadLoss": {"rows": 256, "width": 50304, "kept": True},
    "HeadLoss, the largest logit not taken off": {"rows": 256, "width": 50304, "kept": True, "maximum": False},
    "HeadLoss, exp": {"rows": 256, "width": 50304, "kept": True, "exp2": False},
    "512 rows, 50,304 apart, exp2": {"rows": 512, "width": 50304},
    "1,024 rows, 50,304 apart, exp2": {"rows": 1024, "width": 50304},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--rounds", type=int, choices=range(1, 1000), metavar="N", default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    x, weight = torch.randn(N, args.channels), 0.05 * torch.randn(V, args.channels)
    targets = torch.randint(V, (N,))
    expected, off, seconds = plain(x, weight, targets), {}, {name: [] for name in WAYS}
    for number in range(args.rounds + 1):
        for name in WAYS if number % 2 else reversed(WAYS):
            began = time.perf_counter()
            found = chunked(x, weight, targets, **WAYS[name]) if WAYS[name] else plain(x, weight, targets)
            seconds[name].append(time.perf_counter() - began)
            off[name] = [(a - b).abs().max().item() for a, b in zip(found, expected, strict=True)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {N} x {args.channels} over {V} tokens")
    print("| way | ms, median (least to most) | off in loss | in gradients |")
    print("|---|---|---|---|")
    for name, values in seconds.items():
        ms = [1000 * s for s in values[1:]]  # the first round warms up
        span = f"{statistics.median(ms):.0f} ({min(ms):.0f} to {max(ms):.0f})"
        print(f"| {name} | {span} | {off[name][0]:.1e} | {max(off[name][1:]):.1e} |")


if __name__ == "__main__":
    main()
