"""Train GPT-2 (124M) from scratch, in one file that reads from top to bottom.

    python train_gpt2.py --demo                         # a small one, anywhere
    python train_gpt2.py                                # GPT-2 124M on one GPU
    torchrun --nproc_per_node=8 train_gpt2.py           # the same run on eight
    python train_gpt2.py --optimizer muon               # ... from fewer tokens
    python train_gpt2.py --sample --prompt "Once upon"  # text from the newest
    python train_gpt2.py --export my_gpt2               # ... for transformers

The same command again resumes from the newest checkpoint. Shards come from
fineweb.py. --out_dir gets log.jsonl, curves.png and ckpt_STEP.pt.
"""

# Shapes in comments: B batch, T time (positions), C channels (n_embd), H heads, D = C / H,
# V vocabulary (vocab_size). What is not the story of training stands aside, in support/.

import dataclasses
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # which PYTHONSAFEPATH=1 leaves out
import fineweb
from support.cli import Config, UserError, one_line, option, parse_configs, run_script, warn
from support.files import prefetch, whole_folder
from support.order import sequences_at, tokens_before, tokens_of
from support.tokens import END_OF_TEXT, N_VOCAB, Shard, find_shards, tokenizer

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class GPTConfig(Config):
    """The shape of a GPT; by default GPT-2 124M, its 50257 tokens padded to a multiple of 128."""

    block_size: int = option(1024, "longest context, in tokens", min=1, fixed=True)
    vocab_size: int = option(50304, "rows of the embedding, padding included", min=1, fixed=True)
    n_layer: int = option(12, "transformer blocks", min=1, fixed=True)
    n_head: int = option(12, "attention heads", min=1, fixed=True)
    n_embd: int = option(768, "channels", min=1, fixed=True)

    def check(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"--n_embd {self.n_embd} is not divisible by --n_head {self.n_head}")

    @property
    def n_vocab(self) -> int:
        """How many rows of the embedding are real tokens: ids 0 to n_vocab - 1."""
        return min(self.vocab_size, N_VOCAB)


@dataclass(frozen=True)
class TrainConfig(Config):
    """One training run; the defaults train GPT-2 124M for one epoch of 10B tokens."""

    demo: bool = option(False, "other defaults: a small GPT-2 on text that comes with Python")
    init_from: str = option("scratch", "scratch, gpt2[-medium, -large, -xl], DIR, FILE", fixed=True)
    data_dir: str = option("edu_fineweb10B", "folder of the shards")
    out_dir: str = option("log", "folder for log.jsonl, curves.png and the checkpoints")
    micro_batch: int | Literal["auto"] = option("auto", "sequences per pass; auto: what fits a GPU", min=1)
    max_steps: int = option(19073, "optimiser steps", min=0, fixed=True)
    resume: bool = option(True, "resume from the newest checkpoint in --out_dir")
    extend: bool = option(False, "let --max_steps grow on resume, which stretches the decay")
    seed: int = option(1337, "for initial weights, data order, samples", min=0, fixed=True)
    device: str = option("auto", "cuda, cuda:1, mps or cpu; auto takes the first there is")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("auto", "bfloat16 if the device has it")
    compile: bool = option(True, "use torch.compile for the training step")
    optimizer: Literal["adamw", "muon"] = option("adamw", "muon: for the blocks' matrices", fixed=True)
    warmup_steps: int = option(715, "steps of linear warm-up", min=0, fixed=True)
    max_lr: float = option(6e-4, "learning rate after the warm-up", min=1e-12, fixed=True)
    min_lr: float = option(6e-5, "learning rate at the end", min=0, fixed=True)
    embedding_lr: float = option(1.0, "the embeddings' rate, as a multiple of --max_lr", min=0, fixed=True)
    decay: Literal["cosine", "linear"] = option("cosine", "shape of the way down to min_lr", fixed=True)
    weight_decay: float = option(0.1, "of matrices; adamw: embeddings too", min=0, fixed=True)
    init_std: float = option(0.02, "standard deviation of the initial weights", min=1e-12, fixed=True)
    grad_clip: float = option(1.0, "largest gradient norm; 0 = no limit", min=0, fixed=True)
    batch_tokens: int = option(2**19, "tokens per step, over all ranks", min=1, fixed=True)
    recompute: bool = option(False, "recompute blocks in the backward pass, for memory")
    dropout: float = option(0.0, "of embeddings and branches, for small corpora", min=0, below=1, fixed=True)
    batch_ramp_steps: int = option(0, "steps of a growing batch; 0 = none", min=0, fixed=True)
    batch_ramp_from: int = option(2**15, "tokens of its first step, and its unit", min=1, fixed=True)
    mask_unseen: bool = option(False, "mask tokens that occur nowhere in the shards", fixed=True)
    val_tokens: int = option(10_485_760, "tokens in a validation, at most", min=1)
    eval_every: int = option(250, "steps between validations; 0 = never", min=0)
    hellaswag_every: int = option(250, "steps between HellaSwag evaluations; 0 = never", min=0)
    hellaswag_data: str = option("", "its .parquet or .jsonl file (default: fetched from the Hub)")
    sample_every: int = option(250, "steps between samples; 0 = never", min=0)
    print_every: int = option(0, "steps between lines on the console; 0: by the run's length", min=0)
    save_every: int = option(250, "steps between checkpoints; two are kept; 0 = never", min=0)
    keep_every: int = option(0, "steps between those that are kept for good; 0 = none", min=0)
    keep_best: bool = option(False, "keep the best validation's, too, as ckpt_best.pt")
    track: Literal["", "wandb", "trackio"] = option("", "send the log there, too")

    def check(self):
        if self.min_lr > self.max_lr:
            raise ValueError(f"--min_lr {self.min_lr} is above --max_lr {self.max_lr}")
        if self.max_steps and self.warmup_steps >= self.max_steps:
            raise ValueError(f"--warmup_steps {self.warmup_steps} is not below --max_steps: give a smaller one")
        if self.batch_ramp_steps and self.batch_ramp_from > self.batch_tokens:
            raise ValueError(f"--batch_ramp_from {self.batch_ramp_from} is above --batch_tokens")


@dataclass(frozen=True)
class SampleConfig(Config):
    """How to sample, with --sample and during training."""

    prompt: str = option("Hello, I'm a language model,", "if empty, a document's start")
    num_samples: int = option(4, "samples, drawn as one batch", min=1)
    max_length: int = option(64, "tokens in all, prompt included", min=1)
    top_k: int = option(50, "draw among the k likeliest tokens", min=1)
    temperature: float = option(1.0, "divides the logits; 0 takes the likeliest token", min=0)


# What --optimizer muon changes: from published records of models of this size, see the README.
MUON = {"max_steps": 7000, "warmup_steps": 250, "max_lr": 1.8e-3, "min_lr": 0.0, "embedding_lr": 2.0, "decay": "linear"}

# What --demo changes. Measured for 64 channels, not 768: a higher rate, and initial weights wider by
# sqrt(768 / 64) (benchmarks/README.md). The text is seen three times, hence more weight decay.
DEMO = {
    "data_dir": fineweb.DEMO_DIR, "out_dir": "demo_log", "compile": False, "dtype": "float32",
    "block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 64, "optimizer": "muon", "max_steps": 510,
    "warmup_steps": 40, "max_lr": 16e-3, "min_lr": 0.0, "embedding_lr": 2.0, "decay": "linear",
    "weight_decay": 0.3, "init_std": 0.07, "batch_tokens": 2048, "micro_batch": 8, "batch_ramp_from": 256,
    "mask_unseen": True, "val_tokens": 40_000, "eval_every": 51, "hellaswag_every": 0,
    "sample_every": 255, "save_every": 255, "prompt": "This function returns",
}  # fmt: skip

KINDS = {"training": TrainConfig, "model": GPTConfig, "sampling": SampleConfig}
PRESETS = {("optimizer", "muon"): MUON, ("demo", True): DEMO}
if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    run_script(partial(parse_configs, None, __doc__, PRESETS, KINDS), "train_gpt2.py")  # torch's import takes seconds

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint as recomputed

import hellaswag
from support import checkpoint, cpu, huggingface
from support.log import Log
from support.loss import CrossEntropySum
from support.muon import Muon
from support.world import World, attention_of_any_length, join_world, listen_for_stop

# ---------------------------------------------------------------- model

# cpu.Linear and cpu.linear are nn.Linear and F.linear, faster for a few rows on a CPU.


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = cpu.Linear(config.n_embd, 3 * config.n_embd)  # q, k, v of all heads
        self.c_proj = cpu.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        # Each head attends by itself, so heads go beside the batch: (B, H, T, D).
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))
        if cache is not None:
            # (2, B, H, S, D): keys and values of S positions, of which these T are the last.
            cache[0, :, :, -T:] = k
            cache[1, :, :, -T:] = v
            k, v = cache
        # softmax(q k^T / sqrt(D)) v. One query alone is the last position, and sees all keys.
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # heads side by side again


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = cpu.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = cpu.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    dropout = 0.0  # what prepare_step() sets

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Tensor | None = None) -> Tensor:
        # Pre-norm: what the branches read is normalised, the residual stream itself never is.
        training = torch.is_grad_enabled()
        x = x + F.dropout(self.attn(self.ln_1(x), mask, cache), self.dropout, training)
        return x + F.dropout(self.mlp(self.ln_2(x)), self.dropout, training)


class GPT(nn.Module):
    """GPT-2 on the CPU, its weights drawn from `seed` alone; with None, they are left to be filled."""

    LOGIT_ROWS = 32_768  # at a time: 42,691 of 50,304 pass 2**31 elements, where kernels need 64-bit indices
    LOGIT_BYTES = 3 * 2**29  # in evaluation, which has float32 logits, and as many numbers again for their softmax
    recompute, dropout = False, 0.0  # what prepare_step() sets

    def __init__(self, config: GPTConfig, seed: int | None = 0):
        super().__init__()
        self.config = config
        V, T, C = config.vocab_size, config.block_size, config.n_embd
        with torch.device("meta"):  # skips torch's own initial weights; buffers made here are lost
            self.transformer = nn.ModuleDict({
                # With a weight given: drawing one would import the compiler, for a second.
                "wte": nn.Embedding(V, C, _weight=torch.empty(V, C)),
                "wpe": nn.Embedding(T, C, _weight=torch.empty(T, C)),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(C),
            })  # fmt: skip
            self.lm_head = nn.Linear(C, V, bias=False)
        self.to_empty(device="cpu")
        self.lm_head.weight = self.transformer.wte.weight  # tied
        # Added to the logits: 0, or minus infinity, which leaves a token no probability.
        self.register_buffer("token_bias", torch.empty(V), persistent=False)
        self.allow(range(config.n_vocab))
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int, std: float = 0.02, zero_residual: bool = False) -> None:
        """Normal(0, std); residual projections std / sqrt(2 n_layer), or 0; biases 0, gains 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            residual = name.endswith("c_proj.weight")
            if name.endswith("bias") or (residual and zero_residual):
                p.zero_()
            elif p.dim() < 2:
                p.fill_(1.0)
            elif residual:
                # 2 n_layer of them add up in the residual stream, whatever the depth.
                p.normal_(0.0, std / math.sqrt(2 * self.config.n_layer), generator=generator)
            else:
                p.normal_(0.0, std, generator=generator)
        self.transformer.wte.weight[self.config.n_vocab :] = 0

    def allow(self, token_ids: Iterable[int]) -> None:
        """Mask all tokens but these: nothing else is ever predicted."""
        self.token_bias.fill_(-math.inf)
        self.token_bias[list(token_ids)] = 0.0

    @property
    def token_ids(self) -> Tensor:
        """The tokens that are not masked, in ascending order."""
        return (self.token_bias == 0).nonzero()[:, 0]

    @property
    def n_params(self) -> int:
        """Trainable parameters, without the padding of the embedding."""
        padding = self.transformer.wte.weight[self.config.n_vocab :].numel()
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self) -> int:
        """6 N + 12 L C T as in PaLM (arXiv:2204.02311, appendix B); in N no wpe, which is only added."""
        c = self.config
        positions = sum(p.numel() for name, p in self.named_parameters() if "wpe" in name)
        return 6 * (self.n_params - positions) + 12 * c.n_layer * c.n_embd * c.block_size

    def make_cache(self, B: int, T: int, dtype: torch.dtype) -> Tensor:
        """Room for the keys and values of T positions in every layer: (n_layer, 2, B, H, T, D)."""
        c = self.config
        shape = (c.n_layer, 2, B, c.n_head, T, c.n_embd // c.n_head)
        return torch.empty(shape, dtype=dtype, device=self.lm_head.weight.device)

    def hidden(self, tokens: Tensor, positions=None, mask=None, cache=None) -> Tensor:
        """Hidden states (B, T, C) after ln_f, for token ids (B, T).

        By default, position t sees 0 to t. Positions (B, T) or (T,) and a mask (B, 1, T, T), minus infinity where a
        token (row) may not see another (column), else 0, replace that. With a cache (n_layer, 2, B, H, S, D) tokens are
        the last T of S positions (T = S or 1); their keys and values are put in it.
        """
        T = tokens.size(1)
        if positions is None:
            S = T if cache is None else cache.size(-2)
            positions = torch.arange(S - T, S, device=tokens.device)
        x = self.transformer.wte(tokens) + self.transformer.wpe(positions)
        device, with_gradients = x.device.type, torch.is_grad_enabled()
        if with_gradients and torch.is_autocast_enabled(device):
            # Half the bytes in the residual stream, which most kernels read; LayerNorms compute in float32.
            x = x.to(torch.get_autocast_dtype(device))
        x = F.dropout(x, self.dropout, with_gradients)
        for i, block in enumerate(self.transformer.h):
            if with_gradients and self.recompute:
                x = recomputed(block, x, mask, use_reentrant=False, preserve_rng_state=self.dropout > 0)
            else:
                x = block(x, mask, None if cache is None else cache[i])
        return self.transformer.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C); minus infinity for padding and masked tokens."""
        return cpu.linear(hidden, self.lm_head.weight, self.token_bias)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the targets (B, T), given hidden states (B, T, C)."""
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        if cpu.by_hand(hidden):
            n = self.config.n_vocab
            return cpu.head_loss(hidden, self.lm_head.weight, n, self.token_ids, targets)
        rows, total = self.LOGIT_ROWS, 0.0
        if not torch.is_grad_enabled():
            rows = max(1, self.LOGIT_BYTES // (4 * self.config.vocab_size))
        for x, y in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = self.logits(x)
            narrow = logits.dtype == torch.bfloat16
            total += CrossEntropySum.apply(logits, y) if narrow else F.cross_entropy(logits, y, reduction="sum")
        return total / len(targets)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of token ids (B, T), T <= block_size; with targets (B, T), their mean loss."""
        hidden = self.hidden(tokens)
        return self.logits(hidden) if targets is None else self.loss(hidden, targets)

    @classmethod
    def from_checkpoint(cls, state: dict[str, Any]) -> "GPT":
        """The model of a checkpoint that checkpoint.read() gave."""
        model = cls(GPTConfig(**state["GPTConfig"]), seed=None)
        model.load_state_dict(state["model"])
        if state["TrainConfig"].get("mask_unseen"):
            model.allow(state["token_ids"])
        return model

    @classmethod
    def from_pretrained(cls, name_or_dir: str) -> "GPT":
        """A GPT-2 of `transformers`, its vocabulary padded; UserError as from huggingface.read_gpt2()."""
        shape, weights, token_ids = huggingface.read_gpt2(name_or_dir)
        if shape["vocab_size"] == N_VOCAB:
            shape["vocab_size"] = GPTConfig().vocab_size
        model = cls(GPTConfig(**shape), seed=None)
        for name, ours in model.state_dict().items():
            n = len(weights[name])
            ours[:n] = weights[name]
            ours[n:] = 0  # the padding
        model.allow(token_ids)
        return model

    def save_pretrained(self, folder: Path) -> None:
        """Fill a folder as `transformers` saves a GPT-2; UserError if this is none."""
        shape = dataclasses.asdict(self.config)
        huggingface.write_gpt2(folder, shape, self.state_dict(), self.token_ids.tolist())


def load_model(source: str, block_size: int | None = None) -> GPT:
    """The model of a checkpoint, of the newest in a folder, or of GPT.from_pretrained(), cut to block_size."""
    state = checkpoint.read(Path(source)) if os.path.isfile(source) else checkpoint.newest(source)
    model = GPT.from_checkpoint(state) if state else GPT.from_pretrained(source)
    if block_size and block_size > model.config.block_size:
        raise UserError(f"--block_size {block_size}: {source} has {model.config.block_size} positions", status=2)
    if block_size:
        kept = model.transformer.wpe.weight[:block_size].detach().clone()
        model.transformer.wpe.weight = nn.Parameter(kept)
        model.config = dataclasses.replace(model.config, block_size=block_size)
    return model


# ---------------------------------------------------------------- data order


class Sequences:
    """A split's sequences: number i is block_size + 1 tokens from i * block_size, shard by shard.

    A sequence's last token is the next one's first; none crosses the end of its shard. UserError if
    the folder has no shards of the split, or none as long as a sequence.
    """

    def __init__(self, data_dir: str, split: str, block_size: int, token_ids: Iterable[int]):
        self.block_size = block_size
        self.paths = find_shards(data_dir, split)
        self.shards = [Shard(path, token_ids) for path in self.paths]
        lengths = [shard.length for shard in self.shards]
        self.n_tokens = sum(lengths)
        # Shard s holds the sequences from ends[s - 1] to ends[s] - 1.
        self.ends = np.cumsum([max(0, length - 1) // block_size for length in lengths])
        if len(self) == 0:
            what = f"--block_size {block_size} is too long for the {split} shards in {data_dir}"
            raise UserError(f"{what}: take at most {max(lengths) - 1}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets (the next tokens), each (number of indices, block_size) int64."""
        rows = []
        for i in indices:
            s = int(np.searchsorted(self.ends, i, side="right"))
            first = int(self.ends[s - 1]) if s > 0 else 0
            rows.append(self.shards[s].read((int(i) - first) * self.block_size, self.block_size + 1))
        both = torch.from_numpy(np.stack(rows).astype(np.int64))  # (n, T + 1)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def step_batches(step: int, data: Sequences, config: TrainConfig, rank: int, size: int) -> list:
    """One rank's micro-batches of update `step`, counted from 1: inputs and targets, (B, T) each, and their weight.

    Lay the shuffled epochs end to end: an update reads the next range of that row, each rank a slice of it.
    The arguments alone say who reads what: there is no loader state to save. A weight is a micro-batch's
    share of the whole batch, times the ranks, over which DDP takes the mean.
    """
    T = data.block_size
    first, count = tokens_before(step, config) // T, tokens_of(step, config) // T
    mine = range(first + rank * count // size, first + (rank + 1) * count // size)
    x, y = data.read(sequences_at(mine, len(data), config.seed))
    micro_batch = config.micro_batch
    if step <= config.batch_ramp_steps:  # whose batches are multiples: so torch.compile sees few shapes
        micro_batch = math.gcd(micro_batch, config.batch_ramp_from // T // size)
    n = math.ceil(math.ceil(count / size) / micro_batch)
    batches = []
    for x_part, y_part in zip(x.tensor_split(n), y.tensor_split(n), strict=True):
        weight = len(x_part) * size / count
        # Slices may differ by a sequence: a rank that lacks one still comes to the others' all-reduce.
        batches.append((x_part, y_part, weight) if weight else (x[:1], y[:1], 0.0))
    return batches


def check_batch(config: TrainConfig, block_size: int, ranks: int) -> None:
    """Raise UserError unless each step's tokens are whole sequences, one for each rank at least."""
    for name in ("batch_tokens", "batch_ramp_from") if config.batch_ramp_steps else ("batch_tokens",):
        tokens = getattr(config, name)
        if tokens % block_size or tokens < block_size * ranks:
            what = f"--{name} {tokens}: take a multiple of --block_size {block_size}"
            raise UserError(f"{what}, one or more for each of {ranks} ranks", 2)


# ---------------------------------------------------------------- optimisation


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of update `step`, counted from 1: linear to max_lr, then --decay to min_lr."""
    if step <= config.warmup_steps:
        return config.max_lr * step / config.warmup_steps
    steps = config.max_steps - config.warmup_steps
    done = (step - 1 - config.warmup_steps) / steps  # from 0 to nearly 1
    height = 1 - done if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + height * (config.max_lr - config.min_lr)


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """AdamW that decays matrices and embeddings, but neither biases nor LayerNorms; or Muon.

    Steps and checkpoints take any optimiser. A group's own "lr" is its peak, and keeps its ratio to max_lr.
    """
    parameters = list(model.parameters())
    large = [p for p in parameters if p.dim() >= 2]
    small = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    rest = [p for p in large if p not in set(matrices)]  # wte, wpe, and a head that is not tied
    embeddings = {"params": rest, "lr": config.embedding_lr * config.max_lr}
    adamw = partial(torch.optim.AdamW, lr=config.max_lr, weight_decay=config.weight_decay, eps=1e-8, fused=True)
    if config.optimizer == "muon":
        # For short runs a beta1 of 0.8 was best (benchmarks/README.md).
        others = adamw([embeddings | {"weight_decay": 0.0}, small], betas=(0.8, 0.95))
        return Muon(matrices, others, lr=config.max_lr, weight_decay=config.weight_decay)
    groups = [{"params": large}, small]
    if config.embedding_lr != 1:
        groups = [embeddings, {"params": [p for p in large if p not in set(rest)]}, small]
    return adamw(groups, betas=(0.9, 0.95))


def train_step(model: nn.Module, optimizer: Optimizer, batches: list, step: int, config, world, requests=()) -> tuple:
    """Make update `step`, counted from 1: mean loss over all ranks, gradient norm, whether a rank has requests.

    If loss or norm is not finite, all ranks raise UserError before the update.
    """
    optimizer.zero_grad(set_to_none=True)
    if config.dropout:  # masks come from these and the micro-batches' sizes: a resumed run has the same
        torch.manual_seed(hash((config.seed, step, world.rank)))
    total = torch.zeros((), device=world.device)
    for i, (x, y, weight) in enumerate(batches):
        # Gradients add up over backward(); DDP averages them over ranks once, on the last micro-batch.
        # The context must hold the forward pass too.
        last = i == len(batches) - 1
        with nullcontext() if last or world.size == 1 else model.no_sync():
            with world.autocast():
                loss = model(world.move(x), world.move(y)) * weight
            world.scaler.scale(loss).backward()
        total += loss.detach()
    world.scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    asked = torch.full_like(total, bool(requests))
    loss, norm, asked = world.mean(torch.stack([total, norm, asked])).tolist()  # the step's only wait
    overflow = world.scaler.is_enabled() and math.isfinite(loss)  # of float16: the scaler skips this step
    if not math.isfinite(loss + norm) and not overflow:
        fix = f"start from the newest checkpoint in another --out_dir: --init_from {config.out_dir}, a lower --max_lr"
        raise UserError(f"step {step}: loss {loss}, gradient norm {norm}; no weight was changed: {fix}")
    for group in optimizer.param_groups:
        peak = group.setdefault("initial_lr", group["lr"])  # what make_optimizer() gave the group
        group["lr"] = learning_rate(step, config) * (peak / config.max_lr)
    world.scaler.step(optimizer)
    world.scaler.update()
    return loss, norm, asked > 0


# ---------------------------------------------------------------- evaluation and sampling


@torch.no_grad()
def evaluation_loss(model: GPT, x: Tensor, y: Tensor, world: World) -> Tensor:
    """The mean loss: blocks in the run's dtype, logits in float32, as bfloat16 has steps of 0.5 where OpenAI's lie."""
    with world.autocast():
        hidden = model.hidden(x)
    return model.loss(hidden.float(), y)


@torch.no_grad()
def evaluate(model: GPT, data: Sequences, config: TrainConfig, world: World) -> tuple[float, int]:
    """Mean loss in nats over the first val_tokens of a split, by all ranks; and how many they are."""
    T = data.block_size
    n = min(len(data), max(1, config.val_tokens // T))
    mine = range(n * world.rank // world.size, n * (world.rank + 1) // world.size)
    losses, parts = [], range(0, len(mine), config.micro_batch)
    for i in world.progress(parts, "validation"):
        x, y = data.read(mine[i : i + config.micro_batch])
        losses.append(evaluation_loss(model, world.move(x), world.move(y), world) * len(x))
    mine_total = sum(torch.stack(losses).tolist()) if losses else 0.0
    total, sequences = world.sum(mine_total, len(mine))
    return total / sequences, int(sequences) * T


@torch.no_grad()
def generate(model: GPT, prompt: list[int], config: SampleConfig, seed: int, world: World) -> list:
    """num_samples lists of token ids, max_length at most: the prompt and what comes before <|endoftext|>."""
    device, B, window = world.device, config.num_samples, model.config.block_size
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.full((B, config.max_length), END_OF_TEXT, device=device)
    tokens[:, : len(prompt)] = torch.tensor(prompt)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    cache = model.make_cache(B, min(window, config.max_length), world.dtype)
    cached = 0  # positions in it
    # One autocast around all steps, as it keeps the weights that it has cast.
    with world.autocast(), attention_of_any_length():
        for n in range(len(prompt), config.max_length):  # n tokens are there
            if n <= window:
                hidden = model.hidden(tokens[:, cached:n], cache=cache[..., :n, :])
                cached = n
            else:  # the window moves, and with it each token's position: the cache is of no use
                hidden = model.hidden(tokens[:, n - window : n])
            logits = model.logits(hidden[:, -1]).float()  # (B, V)
            k = 1 if config.temperature == 0 else min(config.top_k, logits.size(1))
            likeliest, ids = logits.topk(k)  # (B, k)
            # The largest becomes 0 first, so that no temperature, however small, overflows.
            scaled = (likeliest - likeliest[:, :1]) / max(config.temperature, 1e-6)
            choice = torch.multinomial(scaled.softmax(dim=1), 1, generator=generator)  # (B, 1)
            drawn = ids.gather(1, choice)[:, 0]
            tokens[:, n] = drawn.masked_fill(ended, END_OF_TEXT)
            ended |= tokens[:, n] == END_OF_TEXT
            if ended.all():
                break
    drawn_rows = tokens[:, len(prompt) :].tolist()
    return [prompt + list(takewhile(lambda token: token != END_OF_TEXT, row)) for row in drawn_rows]


def encode_prompt(config: SampleConfig, n_vocab: int) -> list[int]:
    """Token ids of the prompt, in which <|endoftext|> is one; UserError if it leaves no room, or for an unknown one."""
    prompt = tokenizer().encode(config.prompt, allowed_special="all") or [END_OF_TEXT]
    if len(prompt) >= config.max_length:
        raise UserError(f"--prompt has {len(prompt)} tokens: --max_length must be above that", 2)
    if max(prompt) >= n_vocab:
        raise UserError(f"--prompt has token {max(prompt)}, the model knows {n_vocab}", 2)
    return prompt


def sample_texts(model: GPT, config: SampleConfig, seed: int, world: World) -> list[str]:
    """The samples as text, without the <|endoftext|> that an empty prompt starts from."""
    prompt = encode_prompt(config, model.config.n_vocab)
    samples = generate(model, prompt, config, seed, world)
    first = 1 if prompt[0] == END_OF_TEXT else 0
    return [tokenizer().decode(tokens[first:]) for tokens in samples]


# ---------------------------------------------------------------- training


def start_or_resume(gpt_config: GPTConfig | None, config: TrainConfig, world: World) -> tuple[GPT, Optimizer, int]:
    """Model, optimiser and step, of the newest checkpoint or of a new run; UserError if the flags don't fit."""
    state = checkpoint.newest(config.out_dir)
    if state and not config.resume:
        raise UserError(f"--no-resume, and {config.out_dir} has a run: give another --out_dir", 2)
    if state:
        checkpoint.check_same_run(state, gpt_config, config)
        model, step = GPT.from_checkpoint(state), state["step"]
    elif config.init_from == "scratch":
        model, step = GPT(gpt_config, seed=None), 0
        model.init_weights(config.seed, config.init_std, zero_residual=config.optimizer == "muon")
    else:
        model, step = load_model(config.init_from, gpt_config and gpt_config.block_size), 0
    model.to(world.device)
    optimizer = make_optimizer(model, config)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    if state and "scaler" in state:
        world.scaler.load_state_dict(state["scaler"])
    if world.sum(step)[0] != step * world.size:
        raise UserError(f"the ranks see different checkpoints: they don't share {config.out_dir}")
    # A new run sets its own mask; with --max_steps 0 the weights keep theirs.
    if step == 0 and config.mask_unseen:
        model.allow(fineweb.find_token_ids(config.data_dir, model.config.n_vocab))
    elif step == 0 and config.max_steps:
        model.allow(range(model.config.n_vocab))
    return model, optimizer, step


def prepare_step(model: GPT, optimizer: Optimizer, config: TrainConfig, start: int, log: Log) -> tuple:
    """What train_step() calls, wrapped and compiled, and the config with the micro-batch that auto stands for."""
    world, T = log.world, model.config.block_size
    model.recompute = config.recompute
    for module in (model, *model.transformer.h):
        module.dropout = config.dropout
    step_model: nn.Module = torch.compile(model, dynamic=False) if config.compile else model
    if world.size > 1:
        with warnings.catch_warnings(action="ignore"):  # torch 2.13 has another name for the last one, 2.11 not
            step_model = DistributedDataParallel(step_model, gradient_as_bucket_view=True, broadcast_buffers=False)
        # One graph, not one for each bucket, whose all-reduce it would hide.
        torch._dynamo.config.optimize_ddp = False
    size, seconds, compiled = config.micro_batch, 0.0, config.compile
    if size == "auto":
        # A power of two, up to a rank's share; resumed, what it was: sums round alike.
        share = max(1, config.batch_tokens // T // world.size)
        size = min(128 if world.on_gpu else 64, 2 ** (share.bit_length() - 1))
        size = log.last("micro_batch", "size", default=size) if start else size

    def first_step() -> None:
        nonlocal seconds
        # Two tensors: of one that comes twice, torch.compile would make another graph.
        shape = (size if world.on_gpu else 1, T)
        x, y = (torch.zeros(shape, dtype=torch.int64, device=world.device) for _ in range(2))
        states = 0 if optimizer.state else 2  # as many as AdamW will keep
        _kept = [torch.empty_like(p) for p in model.parameters() for _ in range(states)]
        # Without DDP's all-reduce, for which a rank that fails would never come.
        with nullcontext() if world.size == 1 else step_model.no_sync():
            for _ in range(2):  # the second time beside the gradients of the first
                began = time.perf_counter()
                with world.autocast():
                    loss = step_model(x, y)
                loss.backward()
                seconds = time.perf_counter() - began
        evaluation_loss(model, x, y, world)

    while start < config.max_steps:
        error = world.attempt(first_step)
        model.zero_grad(set_to_none=True)
        if error is None:
            break
        if isinstance(error, MemoryError) and config.micro_batch == "auto" and size > 1:
            size //= 2
        elif isinstance(error, MemoryError):
            fix = "take a smaller --micro_batch, --recompute, or a smaller model"
            raise UserError(f"out of memory: {size} sequences at a time do not fit this GPU: {fix}")
        elif not compiled:
            raise error
        else:  # each backend has errors of its own
            warn(f"torch.compile does not work here, continuing without it ({one_line(error)})")
            compiled = False
            if world.size > 1:
                step_model.module = model
            else:
                step_model = model
    minutes = seconds * config.batch_tokens / T / world.size / 60
    if minutes > 1 and world.device.type == "cpu":
        warn(f"no GPU: on this CPU a step takes about {minutes:,.0f} minutes; --demo is made for one")
    if config.micro_batch == "auto":
        log.write("micro_batch", start, f"micro-batches of {size} sequences", size=size)
    return step_model, dataclasses.replace(config, micro_batch=size)


def due(step: int, every: int, config: TrainConfig) -> bool:
    """Whether what happens every so many steps, and after the last one, happens after this step."""
    return every > 0 and (step % every == 0 or step == config.max_steps)


def measure(step, model: GPT, optimizer, val_data, examples, config, sample_config, log: Log, requests) -> None:
    """Whatever is due after a step, on the plain model; requests to stop leave out what can wait."""
    validate = val_data is not None and due(step, config.eval_every, config)
    score = examples is not None and due(step, config.hellaswag_every, config)
    if validate:
        loss, tokens = evaluate(model, val_data, config, log.world)
        text = f"validation loss {loss:.4f} over {tokens:,} tokens"
        log.write("val", step, text, loss=loss, tokens=tokens)
        if config.keep_best and log.world.is_main and loss <= log.lowest("val", "loss"):
            checkpoint.save(model, optimizer, step, config, log.world.scaler, "ckpt_best.pt")
    if score and not log.world.any(requests):
        found = examples.summary(hellaswag.evaluate(model, examples, log.world))
        text = f"HellaSwag acc_norm {found['acc_norm']:.4f}, acc {found['acc']:.4f}"
        log.write("hellaswag", step, text, **found)
    if validate or score:
        log.draw_curves()
    sampling = log.world.is_main and not requests and step > 0
    if sampling and due(step, config.sample_every, config):
        texts = sample_texts(model, sample_config, config.seed, log.world)
        for text in texts:
            log.world.say(f"step {step:5d} | sample: {text}")
        log.write("sample", step, texts=texts)


def train(gpt_config: GPTConfig | None, config: TrainConfig, sample_config, world: World) -> None:
    """Train from the newest checkpoint, or from the start, to max_steps."""
    # Prepare: the demo's data; others are there, or fineweb.py must make them first.
    if config.demo and world.is_main:
        fineweb.write_demo(Path(config.data_dir))
    world.sum(0)  # the others wait for its files
    fineweb.check_folder(Path(config.data_dir))

    # Start or resume, and refuse now what would fail later.
    model, optimizer, start = start_or_resume(gpt_config, config, world)
    T, token_ids = model.config.block_size, model.token_ids.tolist()
    if config.max_steps:
        check_batch(config, T, world.size)
    if config.sample_every:
        encode_prompt(sample_config, model.config.n_vocab)
    data = Sequences(config.data_dir, "train", T, token_ids)
    val_data = Sequences(config.data_dir, "val", T, token_ids) if config.eval_every else None
    with closing(Log(config.out_dir, world)) as log:
        log.begin(start, model, optimizer, data, config, sample_config)
        examples = None
        if config.hellaswag_every:
            examples = hellaswag.load_or_warn(config.hellaswag_data, model.config, world)
        step_model, config = prepare_step(model, optimizer, config, start, log)

        # Measure the untrained model, or, again, what a run that was stopped may have left out.
        requests: list[float] = []  # to stop: the times of signals
        look = partial(measure, model=model, optimizer=optimizer, val_data=val_data, examples=examples, config=config,
                       sample_config=sample_config, log=log, requests=requests)  # fmt: skip
        look(start)

        # Loop over steps: train, log, save, measure. Threads read the next steps' batches meanwhile.
        steps = range(start + 1, config.max_steps + 1)
        batches = prefetch(lambda step: step_batches(step, data, config, world.rank, world.size), steps)
        with listen_for_stop(requests, world) as alive:
            # A step's time begins with the end of the step before, whose update a GPU has only just begun.
            began = time.perf_counter()
            for step in steps:
                loss, norm, stop = train_step(step_model, optimizer, next(batches), step, config, world, requests)
                ended = time.perf_counter()
                stop = stop or (world.size == 1 and len(requests) > 0)  # which may have come during the wait
                alive(math.inf if stop else 0)
                left = tokens_before(steps.stop, config) - tokens_before(step + 1, config)
                lr, tokens = learning_rate(step, config), tokens_of(step, config)
                log.train(step, loss, norm, lr, tokens, ended - began, left)
                paused = time.perf_counter()
                keep = config.keep_every > 0 and step % config.keep_every == 0
                if world.is_main and (stop or keep or due(step, config.save_every, config)):
                    checkpoint.save(model, optimizer, step, config, world.scaler)
                if stop:
                    world.say(f"stopped after step {step}, as asked; saved: the same command resumes")
                    break
                look(step)
                alive()
                began = ended + time.perf_counter() - paused  # saving and measuring are left out
    world.say(f"the log, its curves and the checkpoints are in {config.out_dir}")


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> None:
    flags, (config, gpt_config, sample_config) = parse_configs(argv, __doc__, PRESETS, KINDS)
    source = config.out_dir if config.init_from == "scratch" else config.init_from
    if config.init_from != "scratch":
        for name in (vars(gpt_config).keys() | {"init_std"}) & flags.keys() - {"block_size"}:
            raise UserError(f"--{name} can't be chosen: --init_from {source} brings its own", 2)
        if "block_size" not in flags:
            gpt_config = None
    training = not flags["sample"] and not flags["export"]
    with join_world(config.device, config.dtype, training) as world:
        if training:
            train(gpt_config, config, sample_config, world)
        elif world.is_main:
            model = load_model(source, flags.get("block_size"))
            found = checkpoint.find(source)[-1:] or [source]
            print(f"weights of {found[0]}", file=sys.stderr)  # stdout is for the samples
            if flags["export"]:
                with whole_folder(Path(flags["export"])) as folder:
                    model.save_pretrained(folder)
            else:
                for text in sample_texts(model.to(world.device), sample_config, config.seed, world):
                    print("---", file=sys.stderr, flush=True)
                    print(text, flush=True)


if __name__ == "__main__":
    run_script(main, "train_gpt2.py")
