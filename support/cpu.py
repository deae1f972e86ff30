"""Products and loss by hand, for eager float32 on a CPU; nothing here runs on a GPU or under torch.compile."""

import math
import threading
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@lru_cache(maxsize=1)
@torch.inference_mode(False)
def scratch(rows: int, columns: int, thread: int) -> Tensor:
    """Memory for a thread to compute in, the same every time: fresh pages would cost HeadLoss 8% of its time."""
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu")


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x @ weight[:n].T against targets, a few rows at a time.

    x (N, C) and weight (V, C) float32, n <= V, targets (N,) int64; gives a float32 scalar. The gradient is formed on
    the way, in one buffer that is used again, and the (N, V) logits never exist as a whole.
    """

    ROWS = 256

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, n: int, targets: Tensor) -> Tensor:
        N, with_gradient = len(x), any(ctx.needs_input_grad)
        loss, dx = x.new_zeros(()), torch.zeros_like(x)
        weight, whole = weight[:n], torch.zeros_like(weight) if with_gradient else weight
        dweight = whole[:n]
        # Rows that begin at multiples of 256 bytes: products are a quarter faster than with 50257 columns.
        buffer = scratch(min(N, HeadLoss.ROWS), math.ceil(n / 64) * 64, threading.get_ident())
        for x_rows, dx_rows, target in zip(*(z.split(HeadLoss.ROWS) for z in (x, dx, targets)), strict=True):
            # In powers of two, whose kernel is more than twice as fast as exp().
            logits = torch.mm(x_rows / math.log(2), weight.T, out=buffer[: len(target), :n])
            wanted, largest = logits.gather(1, target[:, None]), logits.amax(1, keepdim=True)
            exps = logits.sub_(largest).exp2_()  # of the softmax, before it is divided by their sum
            total = exps.sum(1, keepdim=True)
            loss += (total.log2() + largest - wanted).sum() * math.log(2)
            if with_gradient:
                torch.mm(exps, weight, out=dx_rows).div_(total).sub_(weight[target])
                dweight.addmm_(exps.T, x_rows / total)
        if with_gradient:
            dweight.index_add_(0, targets, x, alpha=-1)
            ctx.save_for_backward(dx.div_(N), whole.div_(N))
        return loss / N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        dx, dweight = ctx.saved_tensors
        return dx.mul_(grad), dweight.mul_(grad), None, None  # in place, as a second gradient of the head is large


def by_hand(x: Tensor) -> bool:
    """Whether what is written by hand for eager float32 on a CPU applies to x."""
    eager = not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return eager and x.device.type == "cpu" and x.dtype == torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T + bias, for x (..., in), weight (out, in) and bias (out,); gives (..., out)."""
    rows = x.numel() // x.size(-1)
    if 1 < rows <= 4 and by_hand(x):
        # A few samples, one token each: MKL is up to three times as fast with the weights on the left.
        return (weight @ x.reshape(rows, -1).T).T.contiguous().view(*x.shape[:-1], -1) + bias
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class GeluLinear(torch.autograd.Function):
    """linear(gelu(x), weight, bias) that keeps only x: gelu(x) is made again, for a quarter less memory in a block."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(F.gelu(x, approximate="tanh"), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        dweight = rows.T @ F.gelu(x, approximate="tanh").flatten(0, -2)
        return torch.ops.aten.gelu_backward(grad @ weight, x, approximate="tanh"), dweight, rows.sum(0)
