"""The processes of a run: who they are, what they compute on, how they are asked to stop."""

import math
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from support.cli import UserError, one_line, say

# Seconds for a rank on CUDA to end its step after a signal; torchrun kills ten seconds later.
PATIENCE = max(5, int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)) - 10)

# SIGHUP comes from a terminal that closes, SIGUSR1 from Slurm before the end of a job's time.
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]

# Dense bfloat16 TFLOP/s with float32 accumulation, from NVIDIA's data sheets; matched as whole words.
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "GH200": 989, "B200": 2250,
    "A100": 312, "A40": 149.7, "RTX A6000": 154.8, "A10": 125, "L40S": 362, "L4": 121,
    "RTX 6000 Ada": 364, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of a known GPU in FLOP/s, None for any other device and for float32."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"\b(Ti|D|Laptop|MIG)\b", name):  # part of a GPU, or a lesser one
        return None
    return next((1e12 * peak for gpu, peak in PEAK_TFLOPS.items() if re.search(rf"\b{gpu}\b", name)), None)


def attention_of_any_length():
    """A context for lengths that change all the time: not cuDNN's, torch's choice on Hopper, which plans for each."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


@dataclass(frozen=True)
class World:
    """Which of the run's processes (ranks) this one is, and the device it computes on.

    All ranks must call mean(), sum(), any(), Muon.step() and what DDP wraps in the same order, or they hang.
    """

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def autocast(self) -> torch.autocast:
        """Matrix products in bfloat16 or float16, if that is the run's dtype."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @cached_property
    def scaler(self) -> torch.amp.GradScaler:
        """Scales losses, as small gradients vanish in float16; for other dtypes it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def move(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; on CUDA without waiting for the copy."""
        if self.on_gpu:
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def mean(self, value: Tensor) -> Tensor:
        """The average of a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def sum(self, *values: float) -> list[float]:
        """Each number added up over all ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, value) -> bool:
        """Whether the value is true on some rank."""
        return self.sum(bool(value))[0] > 0

    def attempt(self, function: Callable[[], None]) -> Exception | None:
        """What function() raised, on this rank or another; MemoryError if it was too much for the GPU of any."""
        error, short = None, False
        try:
            function()
        except Exception as raised:  # Triton and cuBLAS have no exception of their own for this
            short = bool(re.search("out of memory|ALLOC_FAILED", str(raised)))
            error = None if short else raised  # its traceback would hold tensors
        too_much, failed = self.sum(short, error is not None)  # all ranks must come here
        if too_much:
            torch.cuda.empty_cache()
            return MemoryError()
        return error or (RuntimeError("it failed on another rank") if failed else None)

    def progress(self, parts, what: str) -> tqdm:
        """A bar on the first rank's terminal, if there is one, after five seconds."""
        return tqdm(parts, what, leave=False, delay=5, disable=None if self.is_main else True)

    def say(self, text: str) -> None:
        if self.is_main:
            say(text)


def pick_device(name: str, local_rank: int, local_size: int) -> torch.device:
    """The device for this process of local_size on the machine; UserError if it isn't there."""
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps and local_size == 1 else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: take auto, cuda, cuda:1 (for example), mps or cpu", status=2)
    device = torch.device(name)
    if device.type == "mps" and not mps:
        raise UserError("--device mps: not available here, take --device cpu")
    if device.type == "cuda":
        found = torch.cuda.device_count()
        index = local_rank if local_size > 1 else device.index or 0
        if max(index + 1, local_size) > found:
            raise UserError(f"--device {name}: {local_size} processes, but {found} CUDA devices; take --device cpu")
        device = torch.device("cuda", index)
    return device


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products in bfloat16: else they cost more than float32's."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@contextmanager
def join_world(device_name: str, dtype_name: str, training: bool = False) -> Iterator[World]:
    """This process's World: alone, or one of the ranks that torchrun started.

    The dtype "auto" is bfloat16 where the device multiplies in it; on a CPU for training alone.
    """
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    try:
        rank, size, local_rank, local_size = (int(os.environ.get(name) or n) for name, n in names.items())
        tasks = 1 if "RANK" in os.environ else int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    except ValueError as error:
        raise UserError(f"one of {', '.join(names)} is no number ({error}): unset it, or use torchrun") from None
    if tasks > 1:
        raise UserError(f"srun has started {tasks} runs that know nothing of each other: see assets/slurm.sh")
    device = pick_device(device_name, local_rank, local_size)
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # float32 is for logits that are exact
    if dtype_name == "auto":
        dtype_name = "bfloat16" if (on_cuda or training) and multiplies_bfloat16(device) else "float32"
    world = World(rank, size, device, getattr(torch, dtype_name))
    if size == 1:
        yield world
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        # Restarted ranks would meet in the old ranks' store (github.com/pytorch/pytorch/issues/135712).
        fix = "set the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
        raise UserError(f"torchrun's --max-restarts doesn't work: {fix}")
    backend, device_id = ("nccl", device) if on_cuda else ("gloo", None)
    try:
        dist.init_process_group(backend, rank=rank, world_size=size, device_id=device_id)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other ranks ({one_line(error)}): start them with torchrun") from None
    try:
        yield world
    except RuntimeError as error:
        gone = "gloo/|NCCL|[Cc]onnection (closed|reset|refused)"
        if not isinstance(error, dist.DistError) and not re.search(gone, str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's: first this line
        fix = "the same command resumes from the newest checkpoint, as does torchrun by itself with --max-restarts"
        raise UserError(f"lost another rank, whose own line says more: {fix} ({one_line(error)})") from None
    # Not after an error: the others may sit in a collective that this rank will never join.
    dist.destroy_process_group()


@contextmanager
def listen_for_stop(requests: list[float], world: World) -> Iterator[Callable]:
    """Put the times of signals to stop into a list; one a second after the first ends the process.

    Ranks on CUDA wait for a dead one in a kernel, for ever. So, after a request, the process says so and ends
    if alive() is not called for PATIENCE seconds. That is yielded, for the end of each step; alive(math.inf)
    switches the watch off.
    """
    latest = [0.0]

    def alive(until: float = 0.0) -> None:
        latest[0] = max(until, time.monotonic())

    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield alive
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    # In a thread: Python calls a handler only after the operation at work, which may wait for a rank.
    def listen() -> None:
        while True:
            try:
                number = receiver.recv(1)
            except TimeoutError:
                if time.monotonic() > max(latest[0], requests[0]) + PATIENCE:
                    why = f"asked to stop, as by torchrun when a rank is gone, but no step ended in {PATIENCE} s"
                    fix = "the same command resumes; for long steps set TORCH_ELASTIC_SHUTDOWN_TIMEOUT higher"
                    say(f"rank {world.rank}: {why}: {fix}", sys.stderr)
                    os._exit(1)
                continue
            if not number:  # closed
                return
            if number[0] in before:
                if requests and time.monotonic() - requests[0] > 1:
                    os._exit(128 + number[0])
                requests.append(time.monotonic())
                if world.size > 1 and world.on_gpu:
                    receiver.settimeout(0.1)

    heard = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]  # as nohup sets it
    before = {number: signal.signal(number, lambda *_: None) for number in heard}
    fd_before = signal.set_wakeup_fd(sender.fileno())  # an event loop's, in a notebook
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield alive
    finally:
        alive(math.inf)
        signal.set_wakeup_fd(fd_before)
        sender.close()
        for number, handler in before.items():
            signal.signal(number, handler)
