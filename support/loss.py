"""Cross-entropy of bfloat16 logits, for torch.compile to make two kernels of."""

import torch
from torch import Tensor


class CrossEntropySum(torch.autograd.Function):
    """The sum in nats over targets (N,) int64, for logits (N, V) that are widened to float32, but never as a whole.

    The same as F.cross_entropy(), whose gradient sums a row of zeros and a one for each row of logits first.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        wide = logits.float()
        log_total = wide.logsumexp(1)  # (N,)
        ctx.save_for_backward(logits, targets, log_total)
        return (log_total - wide.gather(1, targets[:, None])[:, 0]).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        logits, targets, log_total = ctx.saved_tensors
        softmax = (logits.float() - log_total[:, None]).exp()
        one_hot = torch.arange(logits.size(1), device=logits.device) == targets[:, None]
        return (grad * (softmax - one_hot.float())).to(logits.dtype), None
