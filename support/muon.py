"""Muon: momentum whose update is made orthogonal, for matrices; AdamW for whatever is none."""

import math

import torch
import torch.distributed as dist
from torch import Tensor


def orthogonalize(x: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Roughly U V^T for each matrix U S V^T in a stack (n, rows, columns), rows <= columns.

    Five Newton-Schulz iterations of a quintic that brings singular values to between 0.7 and 1.2; which
    of these it is does not matter to training. Coefficients: Keller Jordan, kellerjordan.github.io/posts/muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)  # singular values of at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Muon for matrices (2-D), another optimiser for the rest, with one state and one list of groups.

    As torch.optim.Muon with adjust_lr_fn="match_rms_adamw" (arXiv:2502.16982): an update has the root
    mean square of AdamW's, 0.2 lr, so that both take one schedule. But matrices of one shape, or its transpose,
    are one stack, in 200 kernels instead of 1,400 for GPT-2 124M, and each rank computes a share of it.
    """

    def __init__(self, matrices, others: torch.optim.Optimizer, lr: float, weight_decay: float, dtype=None):
        self.others = others
        ours = {"params": matrices, "lr": lr, "weight_decay": weight_decay, "momentum": 0.95}
        super().__init__([ours, *others.param_groups], {})
        # The dtype of the products, whatever the run's: bfloat16 is precise enough, but on most CPUs slow.
        self.dtype = dtype or (torch.bfloat16 if matrices[0].is_cuda else torch.float32)

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters; every rank calls it, with the same gradients."""
        ours, *others = self.param_groups
        self.update_matrices(ours)
        # load_state_dict() has made a new state and new groups: hand over those of now.
        self.others.param_groups, self.others.state = others, self.state
        self.others.step()

    def update_matrices(self, group: dict) -> None:
        stacks: dict[tuple[int, int], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                stacks.setdefault((min(p.shape), max(p.shape)), []).append(p)
        for (rows, columns), params in stacks.items():
            updates = [update if update.size(0) == rows else update.T for update in self.accelerate(params, group)]
            updates = self.share(updates, rows, columns)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(params, updates, strict=True):
                scale = 0.2 * math.sqrt(columns)  # its own root mean square is 1 / sqrt(columns)
                p.add_(update if p.size(0) == rows else update.T, alpha=-group["lr"] * scale)

    def accelerate(self, params: list[Tensor], group: dict) -> list[Tensor]:
        """The updates before they are orthogonal: Nesterov's momentum of the gradients."""
        beta, gradients, averages = group["momentum"], [p.grad for p in params], []
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            averages.append(self.state[p]["momentum_buffer"])
        torch._foreach_lerp_(averages, gradients, 1 - beta)
        return torch._foreach_lerp(gradients, averages, beta)

    def share(self, updates: list[Tensor], rows: int, columns: int) -> Tensor:
        """The stack (n, rows, columns) of n orthogonal updates; each rank computes a part, and all get all."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        n = math.ceil(len(updates) / size)
        mine = torch.zeros(n, rows, columns, dtype=self.dtype, device=updates[0].device)
        for i, update in enumerate(updates[rank * n : (rank + 1) * n]):
            mine[i] = update
        mine = orthogonalize(mine)
        if size == 1:
            return mine
        parts = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(parts, mine)
        return torch.cat(parts)[: len(updates)]
