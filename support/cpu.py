"""Products and loss by hand, for eager float32 on a CPU; never on a GPU or under torch.compile."""

import math
import threading
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def by_hand(x: Tensor) -> bool:
    """Whether what is written here applies to x."""
    eager = not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return eager and x.device.type == "cpu" and x.dtype == torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T + bias, for x (..., in), weight (out, in) and bias (out,); gives (..., out)."""
    rows = x.numel() // x.size(-1)
    if 1 < rows <= 4 and by_hand(x):
        # A few samples, one token each: MKL is up to three times as fast with the weights on the left. In one
        # call, as threads that wait for each other lose a time slice where others share the cores.
        return torch.addmm(bias[:, None], weight, x.reshape(rows, -1).T).T.contiguous().view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@lru_cache(maxsize=1)
@torch.inference_mode(False)
def scratch(rows: int, columns: int, thread: int) -> Tensor:
    """A per-thread buffer that is reused: fresh pages would cost HeadLoss 8% of its time."""
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu")


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x @ weight[:n].T, its gradient formed on the way, a few rows at a time.

    x (N, C) and weight (V, C) float32, n <= V, targets (N,) int64; never all of the (N, n) logits.
    """

    ROWS = 256

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, n: int, targets: Tensor) -> Tensor:
        N, with_gradient = len(x), any(ctx.needs_input_grad)
        weight, padded = weight[:n], weight
        loss, dx = x.new_zeros(()), torch.zeros_like(x)
        dpadded = torch.zeros_like(padded) if with_gradient else padded
        dweight = dpadded[:n]
        # Rows that begin at multiples of 256 bytes: products are a quarter faster than with 50,257 columns.
        buffer = scratch(min(N, HeadLoss.ROWS), math.ceil(n / 64) * 64, threading.get_ident())
        size = HeadLoss.ROWS
        for x_rows, dx_rows, target in zip(x.split(size), dx.split(size), targets.split(size), strict=True):
            # In powers of two, whose kernel is more than twice as fast as exp().
            logits = torch.mm(x_rows / math.log(2), weight.T, out=buffer[: len(target), :n])
            wanted = logits.gather(1, target[:, None])
            largest = logits.amax(1, keepdim=True)
            exps = logits.sub_(largest).exp2_()
            total = exps.sum(1, keepdim=True)
            loss += (total.log2() + largest - wanted).sum() * math.log(2)
            if with_gradient:
                # The gradient of the logits is softmax - one_hot; softmax is exps / total.
                torch.mm(exps, weight, out=dx_rows).div_(total).sub_(weight[target])
                dweight.addmm_(exps.T, x_rows / total)
        if with_gradient:
            dweight.index_add_(0, targets, x, alpha=-1)
            ctx.save_for_backward(dx.div_(N), dpadded.div_(N))
        return loss / N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        dx, dweight = ctx.saved_tensors
        return (dx.mul_(grad), dweight.mul_(grad), None, None)  # in place: dweight is as large as the head


def head_loss(hidden: Tensor, weight: Tensor, n_vocab: int, token_ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of targets (N,) among token_ids (ascending), for hidden (N, C), weight (V, C)."""
    n = len(token_ids)
    if not torch.is_grad_enabled():
        weight = weight.detach()  # within HeadLoss a gradient would look wanted
    if n == n_vocab:  # none is masked
        return HeadLoss.apply(hidden, weight, n, targets)
    # A smaller head, of the rows of these tokens alone; places are the targets' among them.
    places = torch.searchsorted(token_ids, targets).clamp(max=n - 1)
    loss = HeadLoss.apply(hidden, weight.index_select(0, token_ids), n, places)
    return torch.where((token_ids[places] == targets).all(), loss, math.inf)
