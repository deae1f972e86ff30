"""Train GPT-2 (124M) from nothing, in one file that reads from top to bottom.

    python train_gpt2.py --demo                           # a small GPT-2 in minutes on any machine, no network
    python train_gpt2.py                                  # GPT-2 124M on one GPU, over the shards of fineweb.py
    torchrun --nproc_per_node=8 train_gpt2.py             # the same run, batch by batch, on eight
    python train_gpt2.py --sample --prompt "Once upon"    # text from the newest checkpoint
    python train_gpt2.py --export my_gpt2                 # the newest checkpoint as a folder for `transformers`

The same command again goes on from the newest checkpoint. Written to --out_dir: log.jsonl (one JSON object a line),
curves.png, ckpt_STEP.pt.

Shapes in comments: B batch, T time (positions), C channels (n_embd), H heads, D = C / H, V vocabulary (vocab_size).
"""

import argparse
import dataclasses
import gc
import math
import os
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import fineweb
import hellaswag
from support import checkpoint, cpu
from support.cli import Config, Parser, UserError, one_line, option, run_script, warn
from support.files import prefetch, whole_folder
from support.log import Log, check_same_data, draw_curves, git_commit, read_log
from support.tokens import END_OF_TEXT, N_VOCAB, Shard, tokenizer
from support.world import World, join_world, peak_flops, stop_requests

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class GPTConfig(Config):
    """The shape of a GPT; the defaults are GPT-2 124M with its vocabulary of 50257 padded to a multiple of 128."""

    block_size: int = option(1024, "longest context, in tokens", minimum=1, fixed=True)
    vocab_size: int = option(50304, "rows of the embedding; past 50257 they take no part", minimum=1, fixed=True)
    n_layer: int = option(12, "transformer blocks", minimum=1, fixed=True)
    n_head: int = option(12, "attention heads", minimum=1, fixed=True)
    n_embd: int = option(768, "channels", minimum=1, fixed=True)

    def check(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"--n_embd {self.n_embd} is not divisible by --n_head {self.n_head}")
        needed = 4 * (self.parameters + (self.vocab_size - self.n_vocab) * self.n_embd)
        if needed > (there := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
            shape = ", ".join(f"--{name} {value}" for name, value in vars(self).items())
            raise ValueError(f"out of memory: {needed / 1e9:,.0f} GB for the weights of {shape}, of {there / 1e9:,.0f}")

    @property
    def n_vocab(self) -> int:
        """How many rows of the embedding are real tokens: ids 0 to n_vocab - 1."""
        return min(self.vocab_size, N_VOCAB)

    @property
    def parameters(self) -> int:
        """Weights that take part: the tied embedding once, without its padded rows."""
        C = self.n_embd
        return (self.n_vocab + self.block_size) * C + self.n_layer * (12 * C + 13) * C + 2 * C


@dataclass(frozen=True)
class TrainConfig(Config):
    """One training run; the defaults train GPT-2 124M for one epoch of 10B tokens."""

    data_dir: str = option("edu_fineweb10B", "folder of the shards")
    out_dir: str = option("log", "folder for log.jsonl, curves.png and the checkpoints")
    seed: int = option(1337, "of the first weights, the order of the data, and the samples", minimum=0, fixed=True)
    device: str = option("auto", "cuda, cuda:1, mps or cpu; auto takes the first there is")
    dtype: str = option("auto", "bfloat16 or float32; auto: the first on CUDA", choices=("auto", "bfloat16", "float32"))
    compile: bool = option(True, "use torch.compile for the training step")
    max_steps: int = option(19073, "optimiser steps", minimum=0, fixed=True)
    warmup_steps: int = option(715, "steps of linear warm-up", minimum=0, fixed=True)
    max_lr: float = option(6e-4, "learning rate after the warm-up", minimum=0, fixed=True)
    min_lr: float = option(6e-5, "learning rate at the end of the cosine", minimum=0, fixed=True)
    weight_decay: float = option(0.1, "of tensors of two or more dimensions", minimum=0, fixed=True)
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 = no limit", minimum=0, fixed=True)
    batch_tokens: int = option(2**19, "tokens per optimiser step, over all ranks", minimum=1, fixed=True)
    micro_batch: int = option(64, "sequences per forward pass on one device", minimum=1)
    batch_ramp_steps: int = option(0, "steps over which the tokens per step rise; 0 = none", minimum=0, fixed=True)
    batch_ramp_from: int = option(2**15, "tokens of a ramp's first step; the unit it rises by", minimum=1, fixed=True)
    mask_unseen: bool = option(False, "give no probability to tokens that occur nowhere in the shards", fixed=True)
    val_tokens: int = option(10_485_760, "tokens in a validation, or all if there are fewer", minimum=1)
    eval_every: int = option(250, "steps between validations; 0 = never", minimum=0)
    hellaswag_every: int = option(250, "steps between HellaSwag evaluations; 0 = never", minimum=0)
    hellaswag_data: str = option("", "its .parquet or .jsonl file; empty takes the validation split from the Hub")
    sample_every: int = option(250, "steps between samples; 0 = never", minimum=0)
    save_every: int = option(250, "steps between checkpoints, of which two are kept; 0 = never", minimum=0)
    keep_every: int = option(0, "steps between checkpoints that are kept for good; 0 = none", minimum=0)
    init_from: str = option("scratch", "scratch, gpt2[-medium, -large, -xl], a folder or a checkpoint", fixed=True)
    resume: bool = option(True, "go on from the newest checkpoint in --out_dir")
    extend: bool = option(False, "let a resumed run have a larger --max_steps, which stretches the cosine")
    demo: bool = option(False, "other defaults: a small GPT-2 on text that comes with Python")

    def check(self):
        if self.max_lr == 0:
            raise ValueError(f"--max_lr {self.max_lr} must be above 0")
        if self.max_steps and self.warmup_steps >= self.max_steps:
            raise ValueError(f"--warmup_steps {self.warmup_steps} must be below --max_steps {self.max_steps}")
        if self.min_lr > self.max_lr:
            raise ValueError(f"--min_lr {self.min_lr} must not be above --max_lr {self.max_lr}")
        if self.batch_ramp_steps and self.batch_ramp_from > self.batch_tokens:
            first = f"--batch_ramp_from {self.batch_ramp_from}"
            raise ValueError(f"{first} must not be above --batch_tokens {self.batch_tokens}")


@dataclass(frozen=True)
class SampleConfig(Config):
    """How to sample, from --sample and during training."""

    prompt: str = option("Hello, I'm a language model,", "text to go on from; empty starts from <|endoftext|>")
    num_samples: int = option(4, "samples, drawn as one batch", minimum=1)
    max_length: int = option(64, "tokens in all, prompt included", minimum=1)
    top_k: int = option(50, "draw among the k likeliest tokens", minimum=1)
    temperature: float = option(1.0, "divides the logits; 0 takes the likeliest token", minimum=0)

    def check(self):
        if self.num_samples * self.max_length > 2**26:
            both = f"--num_samples {self.num_samples} x --max_length {self.max_length}"
            raise ValueError(f"{both} is out of memory's reach: take at most {2**26:,} tokens in all")


# What --demo changes: a step takes 0.2 s on two CPU cores.
DEMO = {
    "data_dir": fineweb.DEMO_DIR, "out_dir": "demo_log", "compile": False,
    "block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 64,
    "max_steps": 510, "warmup_steps": 40, "max_lr": 4e-3, "min_lr": 4e-4, "batch_tokens": 2048, "micro_batch": 8,
    "batch_ramp_from": 256, "mask_unseen": True,
    "val_tokens": 40_000, "eval_every": 51, "hellaswag_every": 0, "sample_every": 255, "save_every": 255,
    "prompt": "This function returns",
}  # fmt: skip


def command_line() -> Parser:
    """The parser made from the fields of the configs; a flag that is not given is absent from its result."""
    parser = Parser(
        prog="train_gpt2.py",
        description=__doc__,
        epilog="A run resumes with the settings it began with. Free to change: folders, device, dtype, compile, ranks, "
        "--micro_batch, what is measured, sampled and saved and when, and, with --extend, a larger --max_steps.",
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--sample", action="store_true", help="print samples of the newest checkpoint, or --init_from")
    modes.add_argument("--export", type=Path, metavar="DIR", help="write that model as a new folder for transformers")
    for config in (TrainConfig, GPTConfig, SampleConfig):
        group = parser.add_argument_group(config.__name__)
        for f in dataclasses.fields(config):
            kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": "X"}
            text = f"{f.metadata['help']} (default: {f.default!r})"
            group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **kind)
    return parser


# ---------------------------------------------------------------- model


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = cpu.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = cpu.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Tensor | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            cache[0, :, :, -T:], cache[1, :, :, -T:] = k, v
            k, v = cache  # each (B, H, S, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = cpu.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = cpu.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4 C)
        if cpu.by_hand(x):
            return cpu.GeluLinear.apply(x, self.c_proj.weight, self.c_proj.bias)
        return self.c_proj(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


# Weights that `transformers` keeps as (in, out), nn.Linear as (out, in).
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


class GPT(nn.Module):
    """GPT-2 on the CPU; weights are drawn from `seed` alone, or, if it is None, left for load_state_dict to fill."""

    # Rows of logits at a time: from 42,691 on they pass 2**31 elements at V = 50304, and kernels need 64-bit indices.
    ROWS = 32_768

    def __init__(self, config: GPTConfig, seed: int | None = 0):
        super().__init__()
        self.config = config
        V, T, C = config.vocab_size, config.block_size, config.n_embd
        with torch.device("meta"):  # no time goes into the initial weights of torch, which are not GPT-2's
            self.transformer = nn.ModuleDict({
                # Left to draw weights on this device, an embedding would import the compiler, which takes a second.
                "wte": nn.Embedding(V, C, _weight=torch.empty(V, C)),
                "wpe": nn.Embedding(T, C, _weight=torch.empty(T, C)),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(C),
            })  # fmt: skip
            self.lm_head = nn.Linear(C, V, bias=False)
        self.to_empty(device="cpu")
        self.lm_head.weight = self.transformer.wte.weight
        self.allow(range(config.n_vocab))
        if seed is not None:
            self.init_weights(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Normal with deviation 0.02, divided by sqrt(2 n_layer) for what adds to the residual stream; zero biases."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() >= 2:
                residual = name.endswith("c_proj.weight")
                p.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02, generator=generator)
            else:
                p.fill_(1.0)
        self.transformer.wte.weight[self.config.n_vocab :] = 0

    def allow(self, token_ids: Iterable[int]) -> None:
        """Give a probability to these tokens only; ValueError unless they are some of the n_vocab."""
        ids = sorted(token_ids)
        if not ids or ids[0] < 0 or ids[-1] >= self.config.n_vocab or any(type(i) is not int for i in ids):
            raise ValueError(f"{len(ids)} ids for a mask of a vocabulary of {self.config.n_vocab}")
        # Added to the logits, in a matrix product at no cost: 0, or minus infinity to stay out of the softmax.
        bias = torch.full((self.config.vocab_size,), -math.inf)
        bias[ids] = 0
        self.register_buffer("token_bias", bias.to(self.lm_head.weight.device), persistent=False)

    @property
    def token_ids(self) -> Tensor:
        """The tokens that can have a probability, in ascending order."""
        return (self.token_bias == 0).nonzero()[:, 0]

    def crop(self, block_size: int) -> None:
        """Forget the positions from block_size on."""
        self.config = dataclasses.replace(self.config, block_size=block_size)
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    def make_cache(self, B: int, T: int, dtype: torch.dtype) -> Tensor:
        """Room for the keys and values of T positions in every layer: (n_layer, 2, B, H, T, D)."""
        c = self.config
        shape = (c.n_layer, 2, B, c.n_head, T, c.n_embd // c.n_head)
        return torch.empty(shape, dtype=dtype, device=self.lm_head.weight.device)

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None, cache: Tensor | None = None
    ) -> Tensor:
        """The last block's output after ln_f (B, T, C) for token ids (B, T).

        Positions (B, T) and a mask (B, 1, T, T), true where a token (row) may see another (column), take the place of
        0, 1, 2, ... and of seeing what came before. With a cache (n_layer, 2, B, H, S, D) the tokens are the last T of
        S, either all or one: the cache holds keys and values of those before, and theirs are added to it.
        """
        T = tokens.size(1)
        if positions is None:
            S = T if cache is None else cache.size(-2)
            positions = torch.arange(S - T, S, device=tokens.device)
        x = self.transformer.wte(tokens) + self.transformer.wpe(positions)
        for i, block in enumerate(self.transformer.h):
            x = block(x, mask, None if cache is None else cache[i])
        return self.transformer.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C); minus infinity for tokens that are not allowed."""
        return cpu.linear(hidden, self.lm_head.weight, self.token_bias)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the targets (B, T) after hidden states (B, T, C)."""
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        if cpu.by_hand(hidden):
            ids = self.token_ids
            if len(ids) == self.config.n_vocab:
                # Within cpu.HeadLoss, gradients look wanted even where they are switched off.
                weight = self.lm_head.weight if torch.is_grad_enabled() else self.lm_head.weight.detach()
                return cpu.HeadLoss.apply(hidden, weight, len(ids), targets)
            # A smaller head: the rows of these tokens alone, among which a target stands somewhere else.
            rows = torch.searchsorted(ids, targets).clamp(max=len(ids) - 1)
            loss = cpu.HeadLoss.apply(hidden, self.lm_head.weight.index_select(0, ids), len(ids), rows)
            return torch.where((ids[rows] == targets).all(), loss, math.inf)
        chunks = zip(hidden.split(self.ROWS), targets.split(self.ROWS), strict=True)
        return sum(F.cross_entropy(self.logits(x), y, reduction="sum") for x, y in chunks) / len(targets)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for token ids (B, T), T <= block_size; with targets (B, T), mean cross-entropy in nats."""
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
        """One of OpenAI's four GPT-2s from the Hub, or a folder saved by `transformers`, the vocabulary padded.

        Raises UserError when the weights can't be had or are not those of a GPT-2.
        """
        from huggingface_hub.utils import logging as hub_logging
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
        refused = f"cannot take weights from {name_or_dir}"
        if name_or_dir not in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl") and not os.path.isdir(name_or_dir):
            raise UserError(f"{refused}: not a folder, nor gpt2, gpt2-medium, gpt2-large or gpt2-xl")
        try:
            c = GPT2Config.from_pretrained(name_or_dir)
            if c.vocab_size > N_VOCAB:
                raise ValueError(f"it has {c.vocab_size} tokens, GPT-2 has {N_VOCAB}")
            for key in ("model_type", "activation_function", "layer_norm_epsilon", "n_inner", "scale_attn_weights",
                        "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"):  # fmt: skip
                if (found := getattr(c, key)) != (wanted := getattr(GPT2Config(), key)):
                    raise ValueError(f"its {key} is {found!r}, GPT-2 has {wanted!r}")
            vocab_size = GPTConfig().vocab_size if c.vocab_size == N_VOCAB else c.vocab_size
            shape = GPTConfig(c.n_positions, vocab_size, c.n_layer, c.n_head, c.n_embd)
            if getattr(c, "quantization_config", None) is not None:
                raise ValueError("it is quantized")
            # What the file says of attention could be the name of a kernel to download.
            settings = {"dtype": torch.float32, "use_safetensors": True, "attn_implementation": "eager"}
            theirs, info = GPT2LMHeadModel.from_pretrained(name_or_dir, config=c, output_loading_info=True, **settings)
            if lacking := [*info["missing_keys"], *info["mismatched_keys"]]:
                raise ValueError(f"it lacks {lacking[0]}, as GPT-2 has it")
            unseen = {*(theirs.generation_config.suppress_tokens or ())}
        except Exception as error:  # network, files and formats each have their own
            raise UserError(f"{refused}: {one_line(error)}") from None
        model = cls(shape, seed=None)
        ours = model.state_dict()
        for name, w in theirs.state_dict().items():
            w = w.T if name.endswith(CONV1D) else w
            ours[name][: len(w)], ours[name][len(w) :] = w, 0
        model.allow([i for i in range(c.vocab_size) if i not in unseen] or range(c.vocab_size))
        return model

    def save_pretrained(self, folder: Path) -> None:
        """Fill a folder as `transformers` does: weights, configuration and tokenizer of a GPT2LMHeadModel.

        What token_ids leaves out becomes `suppress_tokens`, which holds for generate() only.
        """
        from safetensors.torch import save
        from transformers import GenerationConfig, GPT2Config

        c = self.config
        weights = {name: w.T if name.endswith(CONV1D) else w for name, w in self.transformer.state_dict().items()}
        weights["wte.weight"] = weights["wte.weight"][:N_VOCAB]
        weights = {f"transformer.{name}": w.cpu().contiguous() for name, w in weights.items()}
        (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
        ends = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
        GPT2Config(
            vocab_size=N_VOCAB, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, architectures=["GPT2LMHeadModel"], dtype="float32", **ends,
        ).save_pretrained(folder)  # fmt: skip
        # In the names of GenerationConfig; its own longest text, 256 new tokens in a pipeline, is for 1,024 positions.
        unseen = sorted({*range(N_VOCAB)}.difference(self.token_ids.tolist())) or None
        longest = c.block_size if c.block_size < 1024 else None
        generation = GenerationConfig(pad_token_id=END_OF_TEXT, max_length=longest, suppress_tokens=unseen, **ends)
        generation.save_pretrained(folder)
        fineweb.fast_tokenizer(model_max_length=c.block_size).save_pretrained(folder)


# ---------------------------------------------------------------- data


def find_shards(data_dir: str, split: str) -> list[Path]:
    """The shards of a split, "train", "val" or "train|val", in order; UserError if there are none."""
    names = os.listdir(data_dir) if os.path.isdir(data_dir) else []
    paths = [Path(data_dir, name) for name in sorted(names) if re.search(rf"_({split})_\d+\.(npy|bin)$", name)]
    if not paths:
        mend = "run `python fineweb.py` first, or try `python train_gpt2.py --demo`"
        raise UserError(f"no {split.replace('|', ' or ')} shards in {data_dir}: {mend}")
    return paths


class Sequences:
    """The sequences of a split, "train" or "val": block_size + 1 tokens from each multiple of block_size in a shard.

    A sequence's last token is the next one's first; none crosses the end of its shard. Raises UserError if the folder
    has no shards of the split, or none as long as a sequence. Only `token_ids`, all if None, may occur.
    """

    def __init__(self, data_dir: str, split: str, config: GPTConfig, token_ids: list[int] | None = None):
        self.config = config
        self.known = np.zeros(2**16, dtype=bool)
        self.known[range(config.n_vocab) if token_ids is None else token_ids] = True
        self.paths = find_shards(data_dir, split)
        self.shards = [Shard(path) for path in self.paths]
        self.n_tokens = sum(len(shard) for shard in self.shards)
        # ends[s] is how many sequences the shards up to and with s hold.
        self.ends = np.cumsum([max(0, len(shard) - 1) // config.block_size for shard in self.shards])
        if not len(self):
            longest = max(len(shard) for shard in self.shards)
            raise UserError(
                f"--block_size {config.block_size} is too long for the {split} shards in {data_dir}: "
                f"the longest has {longest} tokens, so take at most {max(1, longest - 1)}"
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (number of indices, block_size) int64.

        Raises UserError on an id that may not occur, and if a shard is not the file that it was at the start.
        """
        T = self.config.block_size
        rows = []
        for i in indices:
            s = int(np.searchsorted(self.ends, i, side="right"))
            start = (int(i) - (int(self.ends[s - 1]) if s else 0)) * T
            row = self.shards[s].read(start, T + 1)
            if not (known := self.known[row]).all():
                n = np.count_nonzero(self.known)
                found = f"{self.paths[s]} holds token {row[~known][0]}, which is none of the model's {n}"
                raise UserError(f"{found}: restore that shard, or a manifest.json that is about it")
            rows.append(row)
        both = torch.from_numpy(np.stack(rows).astype(np.int64))  # (n, T + 1)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the n sequences in an epoch. NumPy has frozen RandomState: no later version will give another."""
    return np.random.RandomState([seed, epoch]).permutation(n)


def batch_tokens(step: int, config: TrainConfig) -> int:
    """Tokens of the update that makes `step` of them: multiples of batch_ramp_from on the ramp, then batch_tokens."""
    done, ramp, first = step - 1, config.batch_ramp_steps, config.batch_ramp_from
    if done >= ramp:
        return config.batch_tokens
    # To the nearest multiple: the line, in units of first, and a half, rounded down.
    level = (2 * (config.batch_tokens - first) * done + ramp * first) // (2 * ramp * first)
    return min(first + level * first, config.batch_tokens)


def tokens_before(step: int, config: TrainConfig) -> int:
    """Tokens of all updates before that one, without a walk over them."""
    n, ramp, first = min(step - 1, config.batch_ramp_steps), config.batch_ramp_steps, config.batch_ramp_from
    total = n * first + (step - 1 - n) * config.batch_tokens
    # Each level above the first adds tokens to the updates from the one that reaches it to the n-th.
    for level in range(1, math.ceil(batch_tokens(n, config) / first) if n else 0):
        reached = -((1 - 2 * level) * ramp * first // (2 * (config.batch_tokens - first)))  # rounded up
        total += (n - reached) * min(first, config.batch_tokens - level * first)
    return total


def step_batches(step: int, data: Sequences, config: TrainConfig, rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """One rank's micro-batches, inputs and targets (micro_batch, T) each, of the update that makes `step` of them.

    All ranks together read the next S sequences of the endless row of shuffled epochs, S being batch_tokens(step) / T;
    so who reads what depends on nothing but the arguments.
    """
    S, first = (n // data.config.block_size for n in (batch_tokens(step, config), tokens_before(step, config)))
    mine, n = range(first + rank * S // size, first + (rank + 1) * S // size), len(data)
    x, y = data.read([epoch_order(config.seed, i // n, n)[i % n] for i in mine])
    # On the ramp, what divides all its updates: so there are two shapes in all, which torch.compile has to see.
    unit = config.batch_ramp_from if step <= config.batch_ramp_steps else config.batch_tokens
    micro_batch = math.gcd(config.micro_batch, unit // data.config.block_size // size)
    return list(zip(x.split(micro_batch), y.split(micro_batch), strict=True))


def check_batch(config: TrainConfig, block_size: int, ranks: int) -> None:
    """Raise UserError unless ranks and micro-batch divide a step's tokens, and say what would."""
    smallest, together = block_size * ranks, config.micro_batch * block_size * ranks
    if config.batch_ramp_steps and config.batch_ramp_from % smallest:
        first = f"--batch_ramp_from {config.batch_ramp_from} is not a multiple of --block_size {block_size}"
        nearest = math.ceil(config.batch_ramp_from / smallest) * smallest
        raise UserError(f"{first} x {ranks} ranks: take {nearest}", status=2)
    if config.batch_tokens % together == 0:
        return
    sequences, rest = divmod(config.batch_tokens, smallest)
    if rest:
        nearest = max(1, (config.batch_tokens + together // 2) // together) * together
        mend = f"no micro-batch would do; take --batch_tokens {nearest}"
    else:
        wanted = min(config.micro_batch, sequences)
        near = (d for away in range(wanted) for d in (wanted - away, wanted + away) if sequences % d == 0)
        mend = f"take --micro_batch {next(near)}"
    raise UserError(
        f"--batch_tokens {config.batch_tokens} is not a multiple of --micro_batch {config.micro_batch} x --block_size "
        f"{block_size} x {ranks} ranks = {together}: {mend}",
        status=2,
    )


# ---------------------------------------------------------------- optimisation


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of the update that makes `step` of them: linear to max_lr over the warm-up, then a cosine to min_lr."""
    done = step - 1
    if done < config.warmup_steps:
        return config.max_lr * step / config.warmup_steps
    progress = (done - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.max_lr - config.min_lr)


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW that decays matrices and embeddings, but neither biases nor LayerNorms.

    Nothing else asks which optimizer it is. A group with a "lr" of its own keeps its ratio to max_lr.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cuda", "cpu", "mps")
    return torch.optim.AdamW(groups, lr=config.max_lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def flops_per_token(c: GPTConfig) -> int:
    """6 N + 12 L C T as in PaLM (arXiv:2204.02311, appendix B), N without the positions, which multiply nothing."""
    return 6 * (c.parameters - c.block_size * c.n_embd) + 12 * c.n_layer * c.n_embd * c.block_size


# ---------------------------------------------------------------- distributed


# ---------------------------------------------------------------- evaluation and sampling


@torch.no_grad()
def evaluate(model: GPT, data: Sequences, config: TrainConfig, world: World) -> tuple[float, int]:
    """Mean loss in nats over the first val_tokens of a split, dealt out to the ranks, and the number of tokens."""
    T = data.config.block_size
    n = min(len(data), max(1, config.val_tokens // T))
    mine = range(n * world.rank // world.size, n * (world.rank + 1) // world.size)
    losses = []
    for i in range(0, len(mine), config.micro_batch):
        x, y = data.read(mine[i : i + config.micro_batch])
        with world.autocast():
            hidden = model.hidden(world.move(x))
        # Not in bfloat16, which has steps of 0.5 where OpenAI's logits lie.
        losses.append(model.loss(hidden.float(), world.move(y)) * len(x))
    mine_total = sum(torch.stack(losses).tolist()) if losses else 0.0
    total, sequences = world.sum(mine_total, len(mine))
    return total / sequences, int(sequences) * T


@torch.no_grad()
def generate(model: GPT, prompt: list[int], config: SampleConfig, seed: int, world: World) -> list[list[int]]:
    """`num_samples` rows of the prompt and what follows it, max_length tokens at most, none from <|endoftext|> on."""
    device, B, window = world.device, config.num_samples, model.config.block_size
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.full((B, config.max_length), END_OF_TEXT, device=device)
    tokens[:, : len(prompt)] = torch.tensor(prompt)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    cache, cached = model.make_cache(B, min(window, config.max_length), world.dtype), 0
    with (
        world.autocast(),  # around all, as it keeps the weights that it has cast
        # Not cuDNN, which torch prefers on Hopper: it would plan anew for each number of keys.
        sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]),
    ):
        for n in range(len(prompt), config.max_length):  # n tokens are there
            if n <= window:
                hidden, cached = model.hidden(tokens[:, cached:n], cache=cache[..., :n, :]), n
            else:  # the window moves, each token has another position, and with it other keys
                hidden = model.hidden(tokens[:, n - window : n])
            logits = model.logits(hidden[:, -1])  # (B, V)
            likeliest, ids = logits.float().topk(1 if config.temperature == 0 else config.top_k)  # (B, k)
            # The largest becomes 0 first, so that no temperature, however small, overflows.
            scaled = (likeliest - likeliest[:, :1]) / max(config.temperature, 1e-6)
            drawn = torch.multinomial(scaled.softmax(dim=1), 1, generator=generator)  # (B, 1)
            tokens[:, n] = ids.gather(1, drawn)[:, 0].masked_fill(ended, END_OF_TEXT)
            ended |= tokens[:, n] == END_OF_TEXT
            if ended.all():
                break
    drawn_rows = tokens[:, len(prompt) :].tolist()
    return [prompt + list(takewhile(lambda token: token != END_OF_TEXT, row)) for row in drawn_rows]


def encode_prompt(config: SampleConfig, model_config: GPTConfig) -> list[int]:
    """Token ids of the prompt; UserError, status 2, if the sampling flags don't go with it or with the model."""
    prompt = tokenizer().encode_ordinary(config.prompt) or [END_OF_TEXT]
    n, room, vocabulary = len(prompt), config.max_length, model_config.n_vocab
    if n >= room:
        raise UserError(f"--prompt has {n} tokens and --max_length {room} counts them: take at least {n + 1}", status=2)
    if config.top_k > vocabulary:
        raise UserError(f"--top_k {config.top_k} is above the vocabulary of {vocabulary}", status=2)
    if max(prompt) >= vocabulary:
        raise UserError(f"--prompt has token {max(prompt)}, beyond the model's vocabulary of {vocabulary}", status=2)
    return prompt


def sample_texts(model: GPT, config: SampleConfig, seed: int, world: World) -> list[str]:
    """The samples as text, without the <|endoftext|> that an empty prompt starts from."""
    samples = generate(model, encode_prompt(config, model.config), config, seed, world)
    return [tokenizer().decode(s[1:] if s[0] == END_OF_TEXT else s) for s in samples]


# ---------------------------------------------------------------- checkpoints and the log


def load_model(source: str, block_size: int | None = None) -> GPT:
    """The model of a checkpoint, of the newest one in a folder, or what GPT.from_pretrained() takes.

    A block_size takes away the positions from there on; UserError if there are fewer.
    """
    if os.path.isfile(source):
        model = GPT.from_checkpoint(checkpoint.read(Path(source)))
    elif found := checkpoint.newest(source):
        model = GPT.from_checkpoint(found[1])
    else:
        model = GPT.from_pretrained(source)
    longest = model.config.block_size
    if block_size and block_size > longest:
        raise UserError(f"--block_size {block_size} is above the {longest} positions of {source}: take {longest}", 2)
    if block_size:
        model.crop(block_size)
    return model


# ---------------------------------------------------------------- training


def make_step_model(model: GPT, config: TrainConfig, world: World) -> nn.Module:
    """What train_step calls: the model, wrapped for several ranks and compiled, with the same weights."""
    step_model: nn.Module = model
    if world.size > 1:
        device_ids = [world.device] if world.device.type == "cuda" else None
        step_model = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    if config.compile:
        try:  # whether it finds its tools: a C++ compiler for the CPU, Triton for CUDA
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=world.device))
            step_model = torch.compile(step_model, dynamic=False)
        except Exception as error:  # each backend has errors of its own for this
            warn(f"torch.compile does not work here, going on without it ({one_line(error)})")
    return step_model


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list, step: int, config: TrainConfig, world: World
) -> tuple[float, float]:
    """The update that makes `step` of them, from this rank's micro-batches; its loss and its gradient's norm.

    The loss is averaged over all ranks. If one of the two is not finite, all ranks raise UserError before the update.
    """
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=world.device)
    for i, (x, y) in enumerate(batches):
        # Gradients add up over backward(); DDP averages them over ranks once, on the last micro-batch.
        # The context must hold the forward pass too.
        last = i == len(batches) - 1
        with nullcontext() if last or world.size == 1 else model.no_sync():
            with world.autocast():
                loss = model(world.move(x), world.move(y)) / len(batches)
            loss.backward()
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    loss, norm = world.mean(torch.stack([total, norm])).tolist()  # waits for the device
    if not math.isfinite(loss + norm):
        raise UserError(
            f"step {step}: loss {loss}, gradient norm {norm}; the weights stay as they were, and so does the newest "
            f"checkpoint: go on from it in another --out_dir with --init_from {config.out_dir} and a lower --max_lr"
        )
    for group in optimizer.param_groups:
        # The rate that make_optimizer() gave a group is its own for good; its ratio to max_lr is kept.
        own = group.setdefault("initial_lr", group["lr"])
        group["lr"] = learning_rate(step, config) * (own / config.max_lr)
    optimizer.step()
    return loss, norm


def which_tokens(config: TrainConfig, gpt_config: GPTConfig, world: World) -> list[int]:
    """The tokens that the model may give a probability: all, or, with --mask_unseen, those in the shards."""
    if not config.mask_unseen:
        return list(range(gpt_config.n_vocab))
    paths = find_shards(config.data_dir, "train|val")
    found = fineweb.find_token_ids(paths) if world.is_main else []
    ids = np.flatnonzero(world.sum(*np.bincount(found, minlength=2**16))).tolist()  # on all ranks
    if not ids or ids[-1] >= gpt_config.n_vocab:
        what = f"token {ids[-1]}, the model knows {gpt_config.n_vocab}" if ids else "no tokens"
        raise UserError(
            f"{config.data_dir} holds {what}: replace the shards, or a manifest.json that is not about them"
        )
    return ids


def start_or_resume(
    gpt_config: GPTConfig | None, config: TrainConfig, world: World
) -> tuple[GPT, torch.optim.Optimizer, int]:
    """Model, optimiser and step of the newest checkpoint in --out_dir, or of a new run if there is none.

    Weights of --init_from have a shape of their own, whose positions alone may be fewer; without a gpt_config, all are
    kept. A new run's mask is not set yet. Raises UserError if what is there does not fit the flags.
    """
    if not config.resume and (checkpoint.find(config.out_dir) or (Path(config.out_dir) / "log.jsonl").exists()):
        raise UserError(f"--no-resume, and {config.out_dir} holds a run already: give another --out_dir", status=2)
    if found := checkpoint.newest(config.out_dir):
        _, state = found
        checkpoint.check_same_run(state, gpt_config, config)
        model, step = GPT.from_checkpoint(state), state["step"]
    elif config.init_from == "scratch":
        model, step = GPT(gpt_config, config.seed), 0
    else:
        model, step = load_model(config.init_from, gpt_config and gpt_config.block_size), 0
    model.to(world.device)
    optimizer = make_optimizer(model, config)
    if found:
        checkpoint.restore_optimizer(optimizer, state)
    return model, optimizer, step


def load_hellaswag(config: TrainConfig, gpt_config: GPTConfig, world: World) -> hellaswag.HellaSwag | None:
    """The examples, if every rank could have them; else one warning, and None."""
    data, why = None, "another rank can't have it"
    try:
        examples = hellaswag.read_examples(config.hellaswag_data, "completion")
        data = hellaswag.HellaSwag(examples, "completion", gpt_config, world.device.type)
    except (UserError, OSError) as error:
        why = str(error)
    missing = world.sum(data is None)[0]
    if missing:
        warn(f"going on without HellaSwag: {why}")
    return None if missing else data


def due(step: int, every: int, config: TrainConfig) -> bool:
    """Whether something that happens every so many steps, and after the last one, happens after this step."""
    return every > 0 and (step % every == 0 or step == config.max_steps)


def train(gpt_config: GPTConfig | None, config: TrainConfig, sample_config: SampleConfig, world: World) -> None:
    """Train from the newest checkpoint, or from the start, to max_steps."""
    if config.demo and world.is_main:
        fineweb.write_demo(Path(config.data_dir))
    world.sum(0)  # the others wait for the first rank's files
    fineweb.check_folder(Path(config.data_dir))
    model, optimizer, start = start_or_resume(gpt_config, config, world)
    if world.sum(start)[0] != start * world.size:
        raise UserError(f"the ranks see different checkpoints in {config.out_dir}: all machines must share that folder")
    if not start and (config.max_steps or config.mask_unseen):  # only to be evaluated, weights keep their mask
        model.allow(which_tokens(config, model.config, world))
    if config.max_steps:
        check_batch(config, model.config.block_size, world.size)
    if config.sample_every:
        encode_prompt(sample_config, model.config)  # better to hear of a bad flag now
    token_ids = model.token_ids.tolist()
    data = Sequences(config.data_dir, "train", model.config, token_ids)
    val_data = Sequences(config.data_dir, "val", model.config, token_ids) if config.eval_every else None

    out_dir = Path(config.out_dir)
    if start:
        check_same_data(out_dir / "log.jsonl", data, config)
    log = Log(out_dir / "log.jsonl", world)
    if world.is_main:
        for left_over in (*out_dir.glob("ckpt_*.pt.tmp"), out_dir / "curves.png.tmp"):  # by a run that was killed
            left_over.unlink(missing_ok=True)
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
    facts = {
        "torch": torch.__version__, "device": device, "world_size": world.size, "commit": git_commit(),
        "parameters": model.config.parameters, "train_tokens": data.n_tokens, "data": data.paths[0].name.split("_")[0],
        "tokens_allowed": len(token_ids),
    }  # fmt: skip
    settings = {name: value for c in (model.config, config, sample_config) for name, value in vars(c).items()}
    log.write("start", start, **settings | facts)
    world.say(
        f"GPT-2 with {model.config.parameters:,} parameters on {world.size} x {device}, {str(world.dtype)[6:]}; "
        f"{data.n_tokens:,} tokens in {config.data_dir}; step {start} to {config.max_steps}; files in {config.out_dir}"
    )
    if config.mask_unseen:
        world.say(f"{len(token_ids):,} of {model.config.n_vocab:,} tokens occur; the others get no probability")
    examples = load_hellaswag(config, model.config, world) if config.hellaswag_every else None

    requests: list[float] = []

    def stopping() -> bool:
        """Whether any rank was asked to stop; all of them hear the same."""
        return world.sum(bool(requests))[0] > 0

    def look(step: int) -> bool:
        """Whatever is due after a step, while the training clock stands still; returns whether to stop here."""
        stop = stopping()
        to_keep = config.keep_every and step % config.keep_every == 0
        to_save = due(step, config.save_every, config) or to_keep or (stop and (config.save_every or config.keep_every))
        if world.is_main and step > start and to_save:  # first of all, as what comes next takes time
            checkpoint.save(model, optimizer, step, config)
        if stop:
            return True
        if val_data and due(step, config.eval_every, config):
            loss, tokens = evaluate(model, val_data, config, world)
            world.say(f"step {step:5d} | validation loss {loss:.4f} over {tokens:,} tokens")
            log.write("val", step, loss=loss, tokens=tokens)
        if examples and due(step, config.hellaswag_every, config) and not stopping():
            found = examples.summary(hellaswag.evaluate(model, examples, world))
            world.say(f"step {step:5d} | HellaSwag acc_norm {found['acc_norm']:.4f}, acc {found['acc']:.4f}")
            log.write("hellaswag", step, **{name: found[name] for name in ("acc_norm", "acc", "examples")})
        if world.is_main and (due(step, config.eval_every, config) or due(step, config.hellaswag_every, config)):
            try:
                draw_curves(log.path, out_dir / "curves.png")
                gc.collect()  # a figure is made of cycles, megabytes that would pile up
            except Exception as error:  # a picture is no reason to end a run of days
                warn(f"cannot draw {out_dir / 'curves.png'}: {one_line(error)}")
        if world.is_main and step and due(step, config.sample_every, config) and not requests:
            for text in sample_texts(model, sample_config, config.seed, world):
                world.say(f"step {step:5d} | sample: {text}")
        return False

    # A run that was stopped or killed may have left out the evaluations of its last step.
    kinds = {"val": config.eval_every if val_data else 0, "hellaswag": config.hellaswag_every if examples else 0}
    logged = read_log(log.path) if world.is_main else {}
    lacking = any(due(start, every, config) and start not in logged.get(kind, ()) for kind, every in kinds.items())
    if world.sum(world.is_main and lacking)[0] or start in (0, config.max_steps):
        look(start)
    step_model = make_step_model(model, config, world) if start < config.max_steps else model
    peak, flops = peak_flops(world.device, world.dtype), flops_per_token(model.config)
    recent: deque[float] = deque(maxlen=20)  # tokens per second
    end = tokens_before(config.max_steps + 1, config)
    steps = range(start + 1, config.max_steps + 1)
    load = partial(step_batches, data=data, config=config, rank=world.rank, size=world.size)
    batches = prefetch(load, steps)
    with stop_requests(requests):
        for step in steps:
            began = time.perf_counter()
            loss, norm = train_step(step_model, optimizer, next(batches), step, config, world)
            seconds = time.perf_counter() - began
            tokens, lr = batch_tokens(step, config), learning_rate(step, config)
            rate = tokens / seconds
            recent.append(rate)
            mfu = rate * flops / (peak * world.size) if peak else None
            measured = {"ms": 1000 * seconds, "tokens": tokens, "tokens_per_s": rate, "mfu": mfu}
            log.write("train", step, loss=loss, lr=lr, grad_norm=norm, **measured)
            left = timedelta(seconds=round((end - tokens_before(step + 1, config)) / statistics.median(recent)))
            world.say(
                f"step {step:5d}/{config.max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | "
                f"{tokens:,} tokens in {1000 * seconds:.0f} ms, {rate:,.0f}/s | "
                f"{f'MFU {mfu:.1%} | ' if mfu else ''}{left} left"
            )
            if look(step):
                saved = "saved" if config.save_every or config.keep_every else "not saved, as --save_every is 0"
                world.say(f"stopped after step {step}, as asked; {saved}: the same command goes on")
                break
    files = [log.path, out_dir / "curves.png", *checkpoint.find(config.out_dir)[-1:]]
    world.say(f"written: {', '.join(str(path) for path in files if path.exists())}")


def chosen_model(gpt_config: GPTConfig | None, config: TrainConfig) -> tuple[GPT, str]:
    """The model of the newest checkpoint that can be read, or that of --init_from, and where it comes from."""
    if config.init_from != "scratch":
        return load_model(config.init_from, gpt_config and gpt_config.block_size), config.init_from
    if not (found := checkpoint.newest(config.out_dir)):
        raise UserError(f"no checkpoint in {config.out_dir}: train first, or give --out_dir, or --init_from gpt2")
    path, state = found
    return GPT.from_checkpoint(state), str(path)


def sample(model: GPT, source: str, config: TrainConfig, sample_config: SampleConfig, world: World) -> None:
    """Print samples on stdout."""
    texts = sample_texts(model.to(world.device), sample_config, config.seed, world)
    for i, text in enumerate(texts, 1):
        print(f"--- sample {i} of {len(texts)} from {source}", file=sys.stderr, flush=True)
        print(text, flush=True)


def export(model: GPT, source: str, folder: Path) -> None:
    """Write a folder for `transformers`, whole or not at all; UserError unless the vocabulary is GPT-2's."""
    if (n := model.config.n_vocab) < N_VOCAB:
        raise UserError(f"cannot export {source}, which has {n} tokens: the tokenizer has {N_VOCAB}")
    with whole_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
    print(f"{folder}: {source} as transformers loads it", file=sys.stderr)


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> None:
    sys.stdout.reconfigure(errors="replace")  # a terminal that knows ASCII only is no reason to stop
    flags = vars(command_line().parse_args(argv))
    settings = (DEMO if flags.get("demo") else {}) | flags
    try:
        config, gpt_config, sample_config = (
            kind(**{f.name: settings[f.name] for f in dataclasses.fields(kind) if f.name in settings})
            for kind in (TrainConfig, GPTConfig, SampleConfig)
        )
    except ValueError as error:
        raise UserError(str(error), status=2) from None
    if config.init_from != "scratch":
        for f in dataclasses.fields(GPTConfig):
            if f.name in flags and f.name != "block_size":
                raise UserError(f"--{f.name} can't be chosen: --init_from {config.init_from} has its own", status=2)
        if "block_size" not in flags:
            gpt_config = None
    if (folder := flags["export"]) and os.path.lexists(folder):
        raise UserError(f"--export {folder}: that is there already, name a folder that isn't", status=2)
    with join_world(config) as world:
        try:
            if not flags["sample"] and folder is None:
                train(gpt_config, config, sample_config, world)
            elif world.is_main:
                model, source = chosen_model(gpt_config, config)
                if folder is None:
                    sample(model, source, config, sample_config, world)
                else:
                    export(model, source, folder)
        except (RuntimeError, MemoryError) as error:  # the CPU's allocator has no exception of its own
            named = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if not named and not re.search("allocate memory|Storage size", str(error)):
                raise
            smaller = "--num_samples or --max_length" if flags["sample"] else f"--micro_batch than {config.micro_batch}"
            raise UserError(
                f"out of memory: take a smaller {smaller}, or a smaller model ({one_line(error)})"
            ) from None


if __name__ == "__main__":
    run_script(main, "train_gpt2.py")
