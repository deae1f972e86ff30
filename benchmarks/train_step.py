"""How fast the training step is, and how much memory it takes: this script's, beside plain PyTorch and `transformers`.

    python benchmarks/train_step.py                  # demo, demo_unmasked and 124m on a CPU, or gpu
    python benchmarks/train_step.py gpu_tried        # settings that may or may not pay on a GPU, a row each
    python benchmarks/train_step.py --losses 200     # the same steps from the same seed, their losses and a picture

A step is what train_gpt2.py's clock covers: the batch from the shards, forward, backward, clip, update. Each side
is a process of its own, so that its peak of memory is its own (on a GPU that of CUDA's allocator), and trains on the
same batches from the same weights. On a CPU the sides take turns, a step each, in an order that is reversed every time;
on a GPU they run one after another. The batches come from --data_dir, or from the demo corpus, which is written if it
isn't there.

- script: train_gpt2.py as it is. In demo, with a mask on the tokens that don't occur, as --demo has it.
- plain: the same model and the same mathematics without what is written by hand for a CPU, so that the loss is
  F.cross_entropy(lm_head(x) + token_bias), token_bias being minus infinity on masked tokens; in bfloat16, and so on a
  GPU, the loss is support/loss.py's on this side too.
- float32 logits: the head's product and the loss outside autocast (on CUDA, too, in float32 as it is, not TF32).
- transformers: GPT2LMHeadModel with the same weights, dropout 0, SDPA, no cache, and its own loss.

tokens/s is a step's tokens by the median time. MFU counts 6 N + 12 L C T FLOP a token, N without the positions (0.855
GFLOP for GPT-2 124M), against the dense bfloat16 peak of the data sheet (989 TFLOP/s for H100 and H200).
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, which has a hellaswag.py

import argparse  # noqa: E402
import multiprocessing  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from contextlib import nullcontext, suppress  # noqa: E402
from dataclasses import dataclass, field, replace  # noqa: E402
from functools import partial  # noqa: E402
from itertools import count  # noqa: E402
from multiprocessing.connection import Connection  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch._inductor.config  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import fineweb  # noqa: E402
import train_gpt2  # noqa: E402
from support import cpu  # noqa: E402
from support.cli import UserError  # noqa: E402
from support.files import prefetch  # noqa: E402
from support.world import World, join_world, peak_flops  # noqa: E402
from train_gpt2 import DEMO, GPT, GPTConfig, TrainConfig  # noqa: E402


@dataclass(frozen=True)
class Side:
    """One way to train: its name in the table, and what it changes."""

    name: str
    model: str = "script"  # or plain, float32 logits, transformers
    compile: bool = False
    mask: bool = False
    attention: SDPBackend | None = None  # the kernel to prefer; None leaves it to torch
    micro_batch: int | None = None
    rows: int | None = None  # of logits at a time
    inductor: dict = field(default_factory=dict)  # settings of torch._inductor.config


@dataclass(frozen=True)
class Work:
    """What all sides of a table train; the others are compared with the first."""

    shape: GPTConfig
    batch_tokens: int
    micro_batch: int
    sides: tuple[Side, ...]


SCRIPT = Side("script, compiled", compile=True)
CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
DEMO_SHAPE = GPTConfig(**{name: DEMO[name] for name in ("block_size", "n_layer", "n_head", "n_embd")})
WORKS = {
    "demo": Work(DEMO_SHAPE, DEMO["batch_tokens"], DEMO["micro_batch"], (
        Side("script", mask=True),
        Side("plain", "plain", mask=True),
    )),
    "demo_unmasked": Work(DEMO_SHAPE, DEMO["batch_tokens"], DEMO["micro_batch"], (
        Side("script"),
        Side("plain", "plain"),
    )),
    "124m": Work(GPTConfig(), 2048, 2, (
        Side("script, eager"),
        Side("plain, eager", "plain"),
        Side("transformers, eager", "transformers"),
    )),
    "124m_compiled": Work(GPTConfig(), 2048, 2, (
        SCRIPT,
        Side("transformers, compiled", "transformers", compile=True),
    )),
    "gpu": Work(GPTConfig(), 2**19, 64, (
        SCRIPT,
        Side("float32 logits, compiled", "float32 logits", compile=True),
        Side("plain, eager", "plain"),
        Side("transformers, compiled", "transformers", compile=True),
    )),
    "gpu_tried": Work(GPTConfig(), 2**19, 64, (
        SCRIPT,
        replace(SCRIPT, name="cuDNN attention", attention=CUDNN),
        replace(SCRIPT, name="FlashAttention 2", attention=FLASH),
        replace(SCRIPT, name="micro-batch 16", micro_batch=16),
        replace(SCRIPT, name="micro-batch 32", micro_batch=32),
        replace(SCRIPT, name="micro-batch 128", micro_batch=128),
        replace(SCRIPT, name="8,192 rows of logits", rows=8192),
        replace(SCRIPT, name="65,536 rows of logits", rows=65536),
        replace(SCRIPT, name="coordinate descent", inductor={"coordinate_descent_tuning": True}),
        replace(SCRIPT, name="max-autotune", inductor={"max_autotune": True}),
    )),
}  # fmt: skip


class Transformers(nn.Module):
    """GPT2LMHeadModel with a GPT's weights and train_step's signature."""

    def __init__(self, model: GPT):
        super().__init__()
        from transformers import GPT2LMHeadModel

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(Path(folder))
            self.model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        self.model.loss_type = "ForCausalLM"  # else a warning about its lack breaks the compiled graph in two
        self.model.train()

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        # The targets are shifted already.
        return self.model(tokens, labels=targets, shift_labels=targets, use_cache=False).loss


class Float32Logits(GPT):
    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().loss(hidden.float(), targets)


class Trainer:
    """What a side's process does on request; each method's result goes back to the parent."""

    def __init__(self, side: Side, work: Work, config: TrainConfig, world: World):
        if side.model == "plain":
            cpu.by_hand = lambda x: False
        GPT.LOGIT_ROWS = side.rows or GPT.LOGIT_ROWS
        for name, value in side.inductor.items():
            setattr(torch._inductor.config, name, value)
        self.config, self.world, self.attention = config, world, side.attention
        self.shape = work.shape
        model = (Float32Logits if side.model == "float32 logits" else GPT)(work.shape, config.seed)
        if side.mask:
            model.allow(fineweb.find_token_ids(config.data_dir, work.shape.n_vocab))
        self.model = (Transformers(model) if side.model == "transformers" else model).to(world.device)
        self.optimizer = train_gpt2.make_optimizer(self.model, config)
        self.step_model = torch.compile(self.model, dynamic=False) if config.compile else self.model
        self.data = self.sequences("train")
        load = partial(train_gpt2.step_batches, data=self.data, config=config, rank=0, size=1)
        self.batches, self.step = prefetch(load, count(1)), 0

    def sequences(self, split: str) -> train_gpt2.Sequences:
        return train_gpt2.Sequences(self.config.data_dir, split, self.shape.block_size, range(self.shape.n_vocab))

    def kernels(self):
        """The attention that the side prefers, in force."""
        others = [b for b in (CUDNN, FLASH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH) if b != self.attention]
        return sdpa_kernel([self.attention, *others], set_priority=True) if self.attention else nullcontext()

    def steps(self, n: int) -> list[tuple[float, float]]:
        """Train n steps; the seconds and the loss of each."""
        results = []
        for _ in range(n):
            began = time.perf_counter()
            self.step += 1
            with self.kernels():
                loss, _, _ = train_gpt2.train_step(
                    self.step_model, self.optimizer, next(self.batches), self.step, self.config, self.world
                )
            results.append((time.perf_counter() - began, loss))
        return results

    def gradient(self) -> tuple[float, np.ndarray]:
        """Loss and gradient, in one vector, of the first micro-batch at the weights as they are."""
        x, y, _ = train_gpt2.step_batches(1, self.data, self.config, 0, 1)[0]
        self.optimizer.zero_grad(set_to_none=True)
        with self.world.autocast(), self.kernels():
            loss = self.step_model(self.world.move(x), self.world.move(y))
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in self.model.parameters()]).cpu().numpy()

    def memory(self) -> float:
        """The peak so far in MiB: CUDA's allocator's, or the process's."""
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    def validate(self) -> float:
        data = self.sequences("val")
        return train_gpt2.evaluate(self.model, data, self.config, self.world)[0]

    def profile(self) -> tuple[set[str], str]:
        """The names of the attention kernels in a micro-batch's forward and backward, and where its time goes."""
        on_cuda = self.world.device.type == "cuda"
        self.gradient()  # compiled before, if it is to be
        activities = [torch.profiler.ProfilerActivity.CUDA if on_cuda else torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            self.gradient()
        events = profiler.key_averages()
        known = r"(cudnn\w*sdpa|flash_(fwd|bwd)|fmha|_scaled_dot_product)\w*"
        names = {found[0] for event in events if (found := re.search(known, event.key))}
        order = "self_device_time_total" if on_cuda else "self_cpu_time_total"
        return names, events.table(sort_by=order, row_limit=30, max_name_column_width=90)


def serve(connection: Connection, side: Side, work: Work, config: TrainConfig) -> None:
    """What a side's process runs: a Trainer's methods, as they are asked for, until None is."""
    with join_world(config.device, config.dtype) as world:
        trainer = Trainer(side, work, config, world)
        for method, *values in iter(connection.recv, None):
            connection.send(getattr(trainer, method)(*values))


class Process:
    """The parent's end of a side; a side that fails, for want of memory say, says so itself and answers None."""

    def __init__(self, side: Side, work: Work, config: TrainConfig):
        config = replace(
            config,
            compile=side.compile,
            batch_tokens=work.batch_tokens,
            micro_batch=side.micro_batch or work.micro_batch,
        )
        self.name = side.name
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, side, work, config), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str, *values):
        try:
            self.connection.send((method, *values))
            return self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return None

    def end(self) -> None:
        with suppress(OSError):
            self.connection.send(None)
        self.process.join()


def in_turns(processes: list[Process], rounds: int) -> dict[str, list]:
    """Run each process's steps, one at a time in turns; (seconds, loss) of each by the processes' names."""
    results = {process.name: [] for process in processes}
    for number in range(rounds):
        for process in processes if number % 2 else processes[::-1]:
            results[process.name] += process.ask("steps", 1) or []
    return results


def measure(name: str, work: Work, config: TrainConfig, args: argparse.Namespace, on_cuda: bool) -> None:
    """Print a work's table, and below it what shows that the sides do the same."""
    c, flops = work.shape, GPT(work.shape, seed=None).flops_per_token()
    print(
        f"\n{name}: {c.n_layer} layers, {c.n_embd} channels, T = {c.block_size}; {work.batch_tokens:,} tokens a step "
        f"in micro-batches of {work.micro_batch} sequences; {args.steps} steps after {args.warmup} to warm up\n"
    )
    print("| side | ms a step, median (least to most) | tokens/s | MFU | peak, MiB | time / first | memory / first |")
    print("|---|---|---|---|---|---|---|", flush=True)
    peak = peak_flops(torch.device("cuda"), torch.bfloat16) if on_cuda else None
    first, notes = None, []
    for group in [[side] for side in work.sides] if on_cuda else [work.sides]:
        processes = [Process(side, work, config) for side in group]
        gradients = [process.ask("gradient") if c == DEMO_SHAPE else None for process in processes]
        results = in_turns(processes, args.warmup + args.steps)
        for process, gradient in zip(processes, gradients, strict=True):
            memory = process.ask("memory")
            profile = process.ask("profile") if on_cuda or args.profile else None
            process.end()
            if memory is None or not (seconds := [s for s, _ in results[process.name]][args.warmup :]):
                print(f"| {process.name} | failed |", flush=True)
                continue
            median, losses = statistics.median(seconds), [loss for _, loss in results[process.name]]
            first = first or (median, memory, gradient)
            rate = work.batch_tokens / median
            print(
                f"| {process.name} | {1000 * median:.1f} ({1000 * min(seconds):.1f} to {1000 * max(seconds):.1f}) "
                f"| {rate:,.0f} | {f'{rate * flops / peak:.1%}' if peak else ''} | {memory:,.0f} "
                f"| {median / first[0]:.2f} | {memory / first[1]:.2f} |",
                flush=True,
            )
            notes.append(f"{process.name}: loss {losses[0]:.5f} at step 1, {losses[-1]:.5f} at step {len(losses)}")
            if gradient:
                off = abs(gradient[0] - first[2][0]), np.abs(gradient[1] - first[2][1]).max()
                notes.append(f"    first micro-batch: off by {off[0]:.1e} in loss, {off[1]:.1e} in gradient")
            if profile:
                notes.append(f"    attention: {', '.join(sorted(profile[0])) or 'no kernel of a known name'}")
                notes.append(profile[1] if args.profile else "")
    print("", *notes, sep="\n", flush=True)


def compare_losses(work: Work, config: TrainConfig, n: int, picture: Path) -> None:
    """Train n steps of the script and of what it is compared with; print the validation losses, draw the others."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=130, layout="constrained")
    axis, final = figure.subplots(), []
    for side, style in zip(work.sides[:2], ("-", "--"), strict=True):
        process = Process(side, work, config)
        losses = [loss for _, loss in process.ask("steps", n)]
        final.append(process.ask("validate"))
        process.end()
        axis.plot(range(1, n + 1), losses, style, label=f"{side.name}, validation {final[-1]:.4f}")
        print(f"{side.name}: batch loss {losses[0]:.5f} at step 1, {losses[-1]:.5f} at step {n}; "
              f"validation loss {final[-1]:.5f}", flush=True)  # fmt: skip
    print(f"the validation losses differ by {abs(final[0] - final[1]):.5f}")
    axis.set(xlabel="step", ylabel="loss of the batch, nats per token")
    axis.grid(color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(picture)
    print(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="work", help=f"of {', '.join(WORKS)}")
    parser.add_argument("--data_dir", default=fineweb.DEMO_DIR, help="folder of the shards")
    parser.add_argument("--steps", type=int, default=20, help="to measure, of each side")
    parser.add_argument("--warmup", type=int, default=4, help="steps before these")
    parser.add_argument("--sides", nargs="*", type=int, help="the numbers of the sides to take, from 0; else all")
    parser.add_argument("--profile", action="store_true", help="print where each side's time goes")
    parser.add_argument("--losses", type=int, metavar="N", help="compare N losses of the first two sides instead")
    parser.add_argument("--picture", default="losses.png", help="where --losses draws them")
    args = parser.parse_args()
    on_cuda = torch.cuda.is_available()
    works = args.works or (["gpu"] if on_cuda else ["demo"] if args.losses else ["demo", "demo_unmasked", "124m"])
    if unknown := [name for name in works if name not in WORKS]:
        parser.error(f"no work {unknown[0]!r}: take {', '.join(WORKS)}")
    if "gpu" in " ".join(works) and not on_cuda:
        parser.error("gpu and gpu_tried need a GPU")
    if not Path(args.picture).parent.is_dir():
        parser.error(f"--picture {args.picture}: there is no such folder")
    if min(args.steps, args.warmup + 1, args.losses or 1) < 1:
        parser.error("--steps and --losses must be at least 1, --warmup 0")
    for work in (WORKS[name] for name in works):
        chosen = [0, 1] if args.losses else args.sides or []
        if any(not 0 <= i < len(work.sides) or (args.losses and work.sides[i].model == "transformers") for i in chosen):
            parser.error("no such --sides, or no validation for --losses (which compares the first two)")
    try:
        if args.data_dir == fineweb.DEMO_DIR:
            fineweb.write_demo(Path(args.data_dir))
        train_gpt2.find_shards(args.data_dir, "train")
    except (UserError, OSError) as error:
        parser.error(str(error))
    steps = args.losses or 19_073
    config = TrainConfig(data_dir=args.data_dir, max_steps=steps, warmup_steps=min(715, steps // 8))
    device = torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}, shards in {args.data_dir}", flush=True)
    for name in works:
        work = WORKS[name]
        config = replace(config, optimizer=DEMO["optimizer"] if work.shape == DEMO_SHAPE else "adamw")
        if args.losses:
            compare_losses(work, config, args.losses, Path(args.picture))
        else:
            sides = tuple(side for i, side in enumerate(work.sides) if i in (args.sides or range(len(work.sides))))
            measure(name, replace(work, sides=sides), config, args, on_cuda)


if __name__ == "__main__":
    main()
