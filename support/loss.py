"""Cross-entropy of bfloat16 logits, written so that torch.compile makes two kernels of it."""

import torch
from torch import Tensor


class CrossEntropySum(torch.autograd.Function):
    """The sum in nats over targets (N,) int64, for bfloat16 logits (N, V) that are widened to float32 in the kernels.

    As F.cross_entropy(..., reduction="sum"), whose backward pass, compiled, sums a one-hot row for each row
    of logits. What is done in place saves memory without the compiler, which undoes it.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        wide = logits.float()
        wanted = wide.gather(1, targets[:, None])  # (N, 1)
        largest = wide.amax(1, keepdim=True)
        # Not logsumexp(), for which the compiled kernel reads the logits twice.
        log_total = wide.sub_(largest).exp_().sum(1, keepdim=True).log() + largest
        ctx.save_for_backward(logits, targets, log_total)
        return (log_total - wanted).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        logits, targets, log_total = ctx.saved_tensors
        softmax = logits.float().sub_(log_total).exp_()
        one_hot = torch.arange(logits.size(1), device=logits.device) == targets[:, None]
        return softmax.sub_(one_hot.float()).mul_(grad).to(logits.dtype), None
