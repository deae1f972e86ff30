"""Fits every GPU, and ends in time; as far as that shows without one."""

import dataclasses
import math
import os
import re
import signal
import time
from functools import partial

import pytest
import torch
from conftest import (
    CPU,
    TINY,
    assert_same,
    be_a_child,
    before_each_step,
    end,
    forkserver,
    free_port,
    losses,
    newest,
    run_train,
    sequences,
    stop_after,
    tiny_flags,
)
from torch.nn import functional as F

import hellaswag
import train_gpt2
from support import cpu, world
from support.log import Log, read_log
from support.loss import CrossEntropySum
from support.world import World, join_world, listen_for_stop
from train_gpt2 import GPT, TrainConfig, evaluate, make_optimizer, prepare_step, train_step

CUDA = World(rank=1, size=2, device=torch.device("cuda"), dtype=torch.bfloat16)
BFLOAT16 = World(rank=0, size=1, device=torch.device("cpu"), dtype=torch.bfloat16)


# ---------------------------------------------------------------- micro-batch


class Gpu(World):
    """A World that behaves as on a GPU, and computes on the CPU."""

    on_gpu = True


def fitted(folder, most: int, batch_tokens: int = 256 * 16, error=None, **changes) -> tuple[int, list[int]]:
    """What is chosen on a GPU with room for so many sequences, and what was tried."""
    model, tried = GPT(TINY), []
    config = TrainConfig(batch_tokens=batch_tokens, compile=False, **changes)

    def forward(x, y):
        tried.append(len(x))
        if len(x) > most:
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        return GPT.forward(model, x, y)

    model.forward = forward
    log = Log(folder, Gpu(0, 1, CPU.device, CPU.dtype))
    step_model, fit = prepare_step(model, make_optimizer(model, config), config, 0, log)
    assert step_model is model
    assert all(p.grad is None for p in model.parameters())
    return fit.micro_batch, tried


def test_auto_takes_the_largest_power_of_two_that_fits(tmp_path):
    assert fitted(tmp_path / "a", 1000) == (128, [128, 128])  # the second adds to gradients
    assert fitted(tmp_path / "b", 127) == (64, [128, 64, 64])
    assert fitted(tmp_path / "c", 5) == (4, [128, 64, 32, 16, 8, 4, 4])
    assert fitted(tmp_path / "d", 1000, batch_tokens=24 * 16) == (16, [16, 16])  # of a rank's 24


def test_auto_counts_an_evaluation_too(monkeypatch, tmp_path):
    def evaluation(model, x, y, world):
        if len(x) > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_gpt2, "evaluation_loss", evaluation)
    assert fitted(tmp_path, 1000)[0] == 32


@pytest.mark.parametrize("text", ["Triton Error [CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_libraries_that_have_no_exception_of_their_own_are_understood(tmp_path, text):
    assert fitted(tmp_path, 8, error=RuntimeError(text))[0] == 8


def test_another_error_in_the_first_step_keeps_its_traceback(tmp_path):
    with pytest.raises(RuntimeError, match="shape of mine"):
        fitted(tmp_path, 0, error=RuntimeError("shape of mine"))


def test_a_resumed_run_keeps_its_micro_batch(shards, tmp_path):
    flags = tiny_flags(shards, tmp_path / "log", micro_batch="auto", max_steps=4)
    stop_after(2, flags)
    path = tmp_path / "log" / "log.jsonl"
    path.write_text(path.read_text().replace('"size": 8', '"size": 2'))
    assert run_train(flags) == 0
    assert list(read_log(path)["micro_batch"].values())[-1]["size"] == 2
    for checkpoint in (tmp_path / "log").glob("ckpt_*.pt"):
        checkpoint.unlink()
    assert run_train(flags) == 0  # another run from the start
    assert list(read_log(path)["micro_batch"].values())[-1]["size"] == 8


def test_where_not_one_sequence_fits_the_line_says_what_to_do(tmp_path):
    with pytest.raises(train_gpt2.UserError, match="1 sequences at a time do not fit this GPU: .*--recompute"):
        fitted(tmp_path / "auto", 0)
    with pytest.raises(train_gpt2.UserError, match="8 sequences at a time do not fit this GPU: .*--micro_batch"):
        fitted(tmp_path / "eight", 4, micro_batch=8)


def test_on_a_cpu_auto_tries_one_sequence_and_is_logged(shards, tmp_path):
    flags = tiny_flags(shards, tmp_path / "auto", micro_batch="auto")
    assert run_train(flags) == 0
    assert [entry["size"] for entry in read_log(tmp_path / "auto" / "log.jsonl")["micro_batch"].values()] == [8]
    assert run_train(tiny_flags(shards, tmp_path / "eight", micro_batch=8)) == 0
    assert losses(tmp_path / "auto") == losses(tmp_path / "eight")


@pytest.mark.parametrize("batch_tokens", [64, 2**31])
def test_on_a_cpu_a_line_says_how_long_a_step_will_take(tmp_path, capsys, batch_tokens):
    model, config = GPT(TINY), TrainConfig(batch_tokens=batch_tokens, compile=False, micro_batch=4)
    prepare_step(model, make_optimizer(model, config), config, 0, Log(tmp_path, CPU))
    said = re.findall(r"warning: no GPU: on this CPU a step takes about ([\d,]+) minutes", capsys.readouterr().err)
    assert len(said) == (batch_tokens > 64)


def agree(rank: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip

    def attempt(error: Exception) -> None:
        if rank == 1:
            raise error

    with join_world("cpu", "float32") as world:
        assert isinstance(world.attempt(partial(attempt, torch.OutOfMemoryError("CUDA out of memory"))), MemoryError)
        assert isinstance(world.attempt(partial(attempt, ValueError("mine"))), (RuntimeError, ValueError)[rank])
        assert world.attempt(lambda: None) is None


def test_what_fails_on_one_rank_fails_on_all():
    port = free_port()
    processes = [forkserver().Process(target=be_a_child, args=(agree, (r, port), None, os.devnull)) for r in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        end(process, 60)
        assert process.exitcode == 0


# ---------------------------------------------------------------- bytes


def test_logits_of_an_evaluation_stay_within_their_bytes(shards, monkeypatch):
    monkeypatch.setattr(cpu, "by_hand", lambda x: False)
    model, data, config = GPT(TINY), sequences(shards, "val"), TrainConfig(val_tokens=160, micro_batch=8)
    whole = evaluate(model, data, config, CPU)[0]
    found, real = [], GPT.logits
    monkeypatch.setattr(GPT, "LOGIT_BYTES", 20 * 4 * TINY.vocab_size)
    monkeypatch.setattr(GPT, "logits", lambda model, hidden: found.append(real(model, hidden)) or found[-1])
    assert evaluate(model, data, config, CPU)[0] == pytest.approx(whole, abs=1e-6)
    assert max(map(len, found)) == 20  # of the 128 of 8 sequences
    assert found[0].dtype == torch.float32


def test_logits_of_hellaswag_stay_within_their_bytes(monkeypatch):
    example = hellaswag.Example(0, [1, 2], [[3], [4, 5], [6], [7, 8, 9]], [1, 2, 1, 3], 0)
    data, model = hellaswag.HellaSwag([example], "completion", TINY), GPT(TINY)
    whole = hellaswag.evaluate(model, data, CPU)
    monkeypatch.setattr(hellaswag, "LOGIT_BYTES", 3 * 4 * TINY.vocab_size)
    sizes, real = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: sizes.append(len(a)) or real(a, b, out=out))
    torch.testing.assert_close(hellaswag.evaluate(model, data, CPU), whole)
    assert sizes == [3, 3, 1]


def saved_bytes(model: GPT, x, y, world: World = CPU) -> tuple[int, dict]:
    """What is kept from the forward pass for the backward pass, and the gradients."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), world.autocast():
        loss = model(x, y)
    loss.backward()
    return sum(kept.values()), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_recompute_keeps_less_and_gives_the_same_gradients_to_the_bit(shards):
    model, (x, y) = GPT(dataclasses.replace(TINY, n_layer=4)), sequences(shards, "train").read(range(8))
    plain, gradients = saved_bytes(model, x, y)
    model.recompute = True
    less, same = saved_bytes(model, x, y)
    assert_same(same, gradients)
    assert less < 0.6 * plain


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_run_with_recompute_is_the_same_to_the_bit(shards, tmp_path, dtype):
    for name in ("plain", "recompute"):
        assert run_train(tiny_flags(shards, tmp_path / name, dtype=dtype, recompute=name == "recompute")) == 0
    assert losses(tmp_path / "plain") == losses(tmp_path / "recompute")
    assert_same(newest(tmp_path / "plain")["model"], newest(tmp_path / "recompute")["model"])


# ---------------------------------------------------------------- precision


def test_the_residual_stream_is_bfloat16_in_training_alone(shards):
    model, (x, y), seen = GPT(TINY), sequences(shards, "train").read(range(4)), []
    for block in model.transformer.h:
        block.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    with BFLOAT16.autocast():
        model(x, y).backward()
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 2
    seen.clear()
    evaluate(model, sequences(shards, "val"), TrainConfig(val_tokens=64, micro_batch=4), BFLOAT16)
    assert seen == [(torch.float32, torch.float32)] * 2


def test_cross_entropy_of_bfloat16_logits_is_that_of_the_same_logits_in_float32():
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(64, 100, generator=generator)).bfloat16()
    logits[:, 90:] = -math.inf  # masked tokens
    targets = torch.randint(0, 90, (64,), generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.float().requires_grad_()
    loss, expected = CrossEntropySum.apply(ours, targets), F.cross_entropy(theirs, targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad.bfloat16())


@pytest.mark.parametrize("found", [{}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_a_cpu_that_multiplies_bfloat16_trains_in_it_and_samples_in_float32(monkeypatch, found):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    for training in (True, False):
        with join_world("cpu", "auto", training) as chosen:
            assert chosen.dtype == (torch.bfloat16 if found and training else torch.float32)


# ---------------------------------------------------------------- clock and end


def test_the_clock_runs_from_one_steps_end_to_the_next_without_what_is_saved_and_measured(
    shards, tmp_path, monkeypatch
):
    now = [0.0]

    def takes(seconds: float, real):
        def function(*args, **kwargs):
            now[0] += seconds
            return real(*args, **kwargs)

        return function

    monkeypatch.setattr(train_gpt2.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train_gpt2, "evaluate", takes(10, train_gpt2.evaluate))
    monkeypatch.setattr(train_gpt2.checkpoint, "save", takes(5, train_gpt2.checkpoint.save))
    monkeypatch.setattr(Log, "train", takes(0.5, Log.train))  # while a GPU may still be at AdamW
    with before_each_step(takes(1, lambda step, model: None)):
        assert run_train(tiny_flags(shards, tmp_path / "log")) == 0
    entries = read_log(tmp_path / "log" / "log.jsonl")["train"].values()
    assert [entry["ms"] for entry in entries] == pytest.approx([1000, 1500, 1500, 1500, 1500, 1500])


def test_the_step_tells_whether_a_rank_was_asked_to_stop(shards):
    model, config = GPT(TINY), TrainConfig(batch_tokens=64, micro_batch=4)
    batches = [(*sequences(shards, "train").read(range(4)), 1.0)]
    for requests in ([], [1.0]):
        result = train_step(model, make_optimizer(model, config), batches, 1, config, CPU, requests)
        assert result[2] is bool(requests)


def hang(what: str) -> None:
    """A rank on CUDA that is asked to stop while it waits for one that is dead, or not."""
    world.PATIENCE = 0.5
    with listen_for_stop([], CUDA) as alive:
        os.kill(os.getpid(), signal.SIGTERM)
        if what == "stops, and takes long to save":
            alive(math.inf)
        for _ in range(5):
            time.sleep(0.2)
            if what == "goes on":
                alive()
    os._exit(7)


@pytest.mark.parametrize(
    ("what", "status"), [("waits for a dead rank", 1), ("goes on", 7), ("stops, and takes long to save", 7)]
)
def test_a_rank_on_cuda_whose_step_does_not_end_after_a_signal_says_so_and_ends(tmp_path, what, status):
    process = forkserver().Process(target=be_a_child, args=(hang, (what,), None, str(tmp_path / "stderr")))
    process.start()
    end(process, 30)
    assert process.exitcode == status
    line = "rank 1: asked to stop, as by torchrun when a rank is gone, but no step ended in 0.5 s: the same"
    assert (tmp_path / "stderr").read_text().startswith(line) == (status == 1)
