"""What a run of days meets: kills, requests to stop, steps without a number, full disks, lost shards and machines."""

import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    ROOT,
    TINY,
    assert_one_line,
    assert_same,
    free_port,
    losses,
    newest,
    run_forked,
    run_script,
    run_train,
    sequences,
    small_files,
    start_forked,
    start_script,
    stop_after,
    tiny_flags,
    wait_for,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fineweb
from support import checkpoint
from support.cli import UserError
from support.log import read_log
from train_gpt2 import GPT, TrainConfig, make_optimizer, step_batches, train_step

STEPS = {"max_steps": 12, "save_every": 2, "eval_every": 6, "sample_every": 6, "max_length": 20, "keep_every": 6}
LONG = {"max_steps": 2000, "save_every": 50, "eval_every": 0}  # more steps than any test waits for


def assert_same_run(out: Path, expected: Path) -> None:
    """Two runs left the same files behind: weights, optimiser, and every line of the log but for its times."""
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in expected.iterdir())
    ours, theirs = newest(out), newest(expected)
    for key in ("model", "optimizer", "step"):
        assert_same(ours[key], theirs[key])
    logs = [read_log(folder / "log.jsonl") for folder in (out, expected)]
    assert losses(out) == losses(expected)
    for event in ("train", "val"):
        kept = [{s: (e["loss"], e.get("grad_norm")) for s, e in log.get(event, {}).items()} for log in logs]
        assert kept[0] == kept[1]


def losses_of(out: Path) -> dict:
    """The training losses logged so far."""
    return read_log(out / "log.jsonl").get("train", {})


def workers_of(torchrun: subprocess.Popen) -> list[int]:
    """The process ids of torchrun's ranks, as far as they are started."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"train_gpt2.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


# ---------------------------------------------------------------- kill at any instant


@pytest.mark.slow
def test_fifty_runs_killed_at_any_instant_end_as_one_that_was_not(shards, tmp_path):
    unbroken = tmp_path / "unbroken"
    flags = ["train_gpt2", *tiny_flags(shards, unbroken, **STEPS)]
    run_forked(flags, tmp_path)
    began = time.monotonic()
    assert run_forked([*flags, "--out_dir", tmp_path / "again"], tmp_path).returncode == 0
    span, rng, left_over, killed = time.monotonic() - began, random.Random(), 0, 0
    for number in range(50):
        out = tmp_path / f"run_{number}"
        flags = ["train_gpt2", *tiny_flags(shards, out, **STEPS)]
        process = start_forked(flags, tmp_path / "out", tmp_path / "err")
        if number % 2:  # in the middle of a save
            saving = f"ckpt_{rng.choice((2, 4, 6, 8, 10, 12)):06d}.pt.tmp"
            while process.is_alive() and not (out / saving).exists():
                pass
            time.sleep(rng.random() / 1000)
        else:
            time.sleep(span * rng.random())
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        left_over += any(out.glob("*.tmp")) if out.exists() else 0
        result = run_forked(flags, tmp_path)
        assert result.returncode == 0, result.stderr
        assert_same_run(out, unbroken)
        shutil.rmtree(out)
    print(f"{killed} runs of 50 were killed before their end, {left_over} of them within a save")
    assert killed >= 25
    assert left_over >= 1


def test_what_a_killed_run_left_is_cleared_and_nothing_else(shards, tmp_path):
    left_over, others = ("ckpt_000099.pt.tmp", "curves.png.tmp"), ("notes.tmp", "other.pt")
    (tmp_path / "log").mkdir()
    for name in (*left_over, *others):
        (tmp_path / "log" / name).touch()
    assert run_train(tiny_flags(shards, tmp_path / "log", eval_every=0)) == 0
    assert {*others} == {path.name for path in (tmp_path / "log").iterdir()} & {*left_over, *others}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_within_a_minute_and_the_same_command_goes_on(shards, tmp_path, rank):
    flags = tiny_flags(shards, tmp_path / "log", **STEPS | {"max_steps": 200, "save_every": 10, "eval_every": 0})
    process = start_script(["train_gpt2.py", *flags], ranks=2)
    wait_for(lambda: checkpoint.find(tmp_path / "log"), process)
    os.kill(workers_of(process)[rank], signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    print(f"rank {rank} killed: the job ended after {time.monotonic() - began:.1f} s")
    assert process.returncode != 0
    assert f"train_gpt2.py [rank {1 - rank}]: lost another rank" in err
    step = newest(tmp_path / "log")["step"]
    assert step < 200
    result = run_script(["train_gpt2.py", *flags], ranks=2)
    assert result.returncode == 0, result.stderr
    assert f"step {step} to 200" in result.stdout
    unbroken = [flag if flag != str(tmp_path / "log") else tmp_path / "unbroken" for flag in flags]
    assert run_script(["train_gpt2.py", *unbroken], ranks=2).returncode == 0
    assert_same_run(tmp_path / "log", tmp_path / "unbroken")


@pytest.mark.slow
def test_torchrun_recovers_from_a_killed_rank_by_itself(shards, tmp_path):
    flags = tiny_flags(shards, tmp_path / "log", **LONG | {"max_steps": 400, "save_every": 20})
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    process = start_script(["train_gpt2.py", *flags], ranks=2, torchrun=["--max-restarts=1"], env=env)
    wait_for(lambda: checkpoint.find(tmp_path / "log"), process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("step 0 to 400") == out.count(" to 400\n") - 1 == 1
    assert list(losses(tmp_path / "log")) == list(range(1, 401))


# ---------------------------------------------------------------- asked to stop


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_run_asked_to_stop_ends_its_step_saves_and_exits_with_0(shards, tmp_path, number):
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    flags = ["train_gpt2", *tiny_flags(shards, tmp_path / "log", **LONG | {"max_steps": 100, "keep_every": 1000})]
    process = start_forked(flags, out, err)
    wait_for(lambda: (tmp_path / "log" / "log.jsonl").exists() and losses_of(tmp_path / "log"), process)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0, err.read_text()
    step = max(losses(tmp_path / "log"))
    assert step < 100
    assert newest(tmp_path / "log")["step"] == step
    assert f"stopped after step {step}, as asked" in out.read_text()
    assert not err.read_text()

    assert run_forked(flags, tmp_path).returncode == 0
    assert run_forked([*flags, "--out_dir", tmp_path / "unbroken"], tmp_path).returncode == 0
    for name in checkpoint.find(tmp_path / "log")[:-1]:  # those of the stop
        name.unlink()
    for name in checkpoint.find(tmp_path / "unbroken")[:-1]:
        name.unlink()
    assert_same_run(tmp_path / "log", tmp_path / "unbroken")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["one rank", "torchrun"])
def test_ranks_stop_together_whoever_is_asked(shards, tmp_path, to):
    process = start_script(["train_gpt2.py", *tiny_flags(shards, tmp_path / "log", **LONG)], ranks=2)
    wait_for(lambda: (tmp_path / "log" / "log.jsonl").exists() and losses_of(tmp_path / "log"), process)
    os.kill(process.pid if to == "torchrun" else workers_of(process)[1], signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    step = newest(tmp_path / "log")["step"]
    assert max(losses(tmp_path / "log")) == step < 2000
    assert f"stopped after step {step}, as asked" in out
    assert "lost another rank" not in err
    assert (process.returncode == 0) == (to == "one rank")  # torchrun has a status of its own for signals


def test_evaluations_left_out_by_a_stop_are_made_up_for(shards, tmp_path):
    flags = tiny_flags(shards, tmp_path / "log", max_steps=6, eval_every=3, save_every=6)
    assert run_forked(["train_gpt2", *flags], tmp_path, hook="sigterm_at_step_3").returncode == 0
    assert list(read_log(tmp_path / "log" / "log.jsonl")["val"]) == [0]
    assert run_train(flags) == 0
    assert run_train(tiny_flags(shards, tmp_path / "unbroken", max_steps=6, eval_every=3, save_every=6)) == 0
    found, expected = (read_log(tmp_path / name / "log.jsonl") for name in ("log", "unbroken"))
    for event in ("train", "val"):
        assert {s: e["loss"] for s, e in found[event].items()} == {s: e["loss"] for s, e in expected[event].items()}


def test_a_stop_while_measuring_leaves_out_what_is_still_to_be_measured(shards, tmp_path):
    flags = tiny_flags(shards, tmp_path / "log", eval_every=2, sample_every=2, max_length=8)
    result = run_forked(["train_gpt2", *flags], tmp_path, hook="sigterm_while_step_2_is_measured")
    assert result.returncode == 0, result.stderr
    assert "step     2 | validation loss" in result.stdout
    assert "sample: " not in result.stdout
    assert "stopped after step 3" in result.stdout


def test_a_second_signal_ends_at_once_and_one_passed_on_twice_does_not(shards, tmp_path):
    flags = ["train_gpt2", *tiny_flags(shards, tmp_path / "log", eval_every=0)]
    (tmp_path / "stdout").touch()
    process = start_forked(flags, tmp_path / "stdout", tmp_path / "stderr", hook="hang_at_step_2")
    wait_for(lambda: "hangs" in (tmp_path / "stdout").read_text(), process)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.3)  # else the system may make one of two
    os.kill(process.pid, signal.SIGTERM)
    process.join(1.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGINT


def test_one_signal_is_one_request_however_long_the_operation_at_work_takes(shards, tmp_path):
    flags = tiny_flags(shards, tmp_path / "log")
    result = run_forked(["train_gpt2", *flags], tmp_path, hook="sigterm_in_a_long_operation_at_step_2")
    assert result.returncode == 0, result.stderr
    assert "stopped after step 2, as asked; saved" in result.stdout


@pytest.mark.slow
def test_a_second_signal_ends_a_rank_that_waits_for_one_that_hangs(shards, tmp_path):
    process = start_script(["train_gpt2.py", *tiny_flags(shards, tmp_path / "log", **LONG)], ranks=2)
    wait_for(lambda: (tmp_path / "log" / "log.jsonl").exists() and losses_of(tmp_path / "log"), process)
    waiting, hung = workers_of(process)
    os.kill(hung, signal.SIGSTOP)
    try:
        time.sleep(0.5)
        os.kill(waiting, signal.SIGTERM)
        time.sleep(1.5)
        os.kill(waiting, signal.SIGTERM)
        wait_for(lambda: waiting not in workers_of(process), process, timeout=20)
    finally:
        os.kill(hung, signal.SIGKILL)
        process.communicate(timeout=60)


# ---------------------------------------------------------------- a bad step


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weight(shards, where):
    model, config = GPT(TINY), TrainConfig(batch_tokens=128, micro_batch=4)
    batches = step_batches(1, sequences(shards, "train"), config, 0, 1)
    optimizer = make_optimizer(model, config)
    train_step(model, optimizer, batches, 1, config, CPU)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    state = {key: value.clone() for key, value in optimizer.state[model.lm_head.weight].items()}
    if where == "loss":
        model.register_forward_hook(lambda module, inputs, loss: loss * math.nan)
    else:
        model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(UserError, match=r"^step 2: loss .*, gradient norm (nan|inf); no weight was changed"):
        train_step(model, optimizer, batches, 2, config, CPU)
    assert_same(dict(model.state_dict()), before)
    assert_same(dict(optimizer.state[model.lm_head.weight]), state)


def test_weights_that_an_update_made_infinite_are_not_saved(shards, tmp_path):
    model, config = GPT(TINY), TrainConfig(out_dir=str(tmp_path))
    model.transformer.ln_f.weight.data[0] = math.inf
    with pytest.raises(UserError, match="^step 2: the weights are not finite, so they are not saved"):
        checkpoint.save(model, make_optimizer(model, config), 2, config)
    assert not [*tmp_path.glob("ckpt*")]


def test_a_step_that_is_not_finite_on_one_rank_stops_all_and_the_last_checkpoint_stays(shards, tmp_path):
    flags = tiny_flags(shards, tmp_path / "log", save_every=1)
    result = run_forked(["train_gpt2", *flags], tmp_path, ranks=2, hook="nan_at_step_4_on_rank_1")
    assert result.returncode != 0
    for rank in (0, 1):
        assert f"train_gpt2.py [rank {rank}]: step 4: loss nan, gradient norm nan" in result.stderr
    run_train(tiny_flags(shards, tmp_path / "good", save_every=1, max_steps=3, warmup_steps=2, micro_batch=4))
    assert list(losses(tmp_path / "log")) == [1, 2, 3]
    assert newest(tmp_path / "log")["step"] == 3
    assert all(w.isfinite().all() for w in newest(tmp_path / "log")["model"].values())


def test_a_step_waits_for_the_device_once_whatever_the_number_of_micro_batches(shards, monkeypatch):
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **kwargs or {})

    real = torch.Tensor.tolist
    lists = []  # of which the mode hears nothing
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor) or real(tensor))
    data, counts = sequences(shards, "train"), []
    for micro_batch in (8, 1):
        model, config = GPT(TINY), TrainConfig(batch_tokens=128, micro_batch=micro_batch)
        optimizer = make_optimizer(model, config)
        batches = step_batches(1, data, config, 0, 1)
        lists.clear()
        with Waits() as waits:
            train_step(model, optimizer, batches, 1, config, CPU)
        counts.append(waits.count + len(lists))
    assert counts == [1, 1]


# ---------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 700 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(shards, small_disk, tmp_path):
    out = small_disk / "log"
    flags = ["train_gpt2", *tiny_flags(shards, out, save_every=1, eval_every=0)]
    result = run_forked([*flags, "--max_steps", 2, "--warmup_steps", 1], tmp_path)
    assert result.returncode == 0, result.stderr
    kept = checkpoint.find(out)
    size = kept[-1].stat().st_size
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(b"x" * (free - size // 2))
    before = {path: path.read_bytes() for path in kept}
    result = run_forked([*flags, "--max_steps", 6, "--warmup_steps", 1, "--extend"], tmp_path)
    assert result.returncode == 1
    assert_one_line(result)
    assert "ckpt_000003.pt" in result.stderr
    assert "No space left on device" in result.stderr
    assert {path: path.read_bytes() for path in checkpoint.find(out)} == before
    assert not list(out.glob("*.tmp"))
    (small_disk / "filler").unlink()
    assert run_forked([*flags, "--max_steps", 6, "--warmup_steps", 1, "--extend"], tmp_path).returncode == 0
    assert list(losses(out)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_log_that_cannot_be_written_is_one_line(shards, tmp_path):
    flags = tiny_flags(shards, tmp_path / "log", max_steps=60, eval_every=0, save_every=0)
    result = run_script(["train_gpt2.py", *flags], preexec_fn=small_files(5000))
    assert result.returncode == 1
    assert result.stderr == f"train_gpt2.py: {tmp_path / 'log' / 'log.jsonl'}: File too large\n"


def test_an_out_dir_that_is_lost_while_training_is_one_line(shards, tmp_path):
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    process = start_forked(["train_gpt2", *tiny_flags(shards, tmp_path / "log", **LONG)], out, err)
    wait_for(lambda: checkpoint.find(tmp_path / "log"), process)
    (tmp_path / "log").rename(tmp_path / "moved")
    process.join(60)
    assert process.exitcode == 1
    assert err.read_text().startswith(f"train_gpt2.py: {tmp_path / 'log' / 'log.jsonl'}: No such file")
    assert err.read_text().count("\n") == 1
    assert checkpoint.find(tmp_path / "moved")


def test_a_checkpoint_that_may_not_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(checkpoint.zipfile, "ZipFile", refuse)
    with pytest.raises(PermissionError):
        checkpoint.read(tmp_path / "ckpt_000002.pt")


def test_a_second_run_in_a_folder_is_refused_and_harms_nothing(shards, tmp_path):
    flags = ["train_gpt2", *tiny_flags(shards, tmp_path / "log", **LONG)]
    first = start_forked(flags, tmp_path / "stdout", tmp_path / "stderr")
    wait_for(lambda: checkpoint.find(tmp_path / "log"), first)
    second = tmp_path / "second"
    second.mkdir()
    result = run_forked(flags, second)
    assert result.returncode == 1
    assert_one_line(result)
    refusal = f"another run is at work in {tmp_path / 'log'}: wait for its end, or give another --out_dir"
    assert refusal in result.stderr
    first.terminate()
    first.join(60)
    assert first.exitcode == 0, (tmp_path / "stderr").read_text()
    assert [*read_log(tmp_path / "log" / "log.jsonl")["start"]] == [0]


def test_the_last_two_checkpoints_are_kept_and_those_of_keep_every(shards, tmp_path):
    for name, changes in (("both", {"save_every": 1}), ("alone", {"save_every": 0})):
        flags = tiny_flags(shards, tmp_path / name, max_steps=8, keep_every=3, eval_every=0, **changes)
        assert run_train(flags) == 0
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path / "both")] == [3, 6, 7, 8]
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path / "alone")] == [3, 6]


def test_a_damaged_checkpoint_never_costs_a_good_one(shards, tmp_path, capsys):
    flags = tiny_flags(shards, tmp_path / "log", max_steps=8, save_every=4, eval_every=0)
    assert run_train(flags) == 0
    (tmp_path / "log" / "ckpt_000008.pt").write_bytes(b"cut short")
    assert run_train([*flags, "--save_every", "1", "--max_steps", "7", "--extend"]) == 2  # a shorter run is another
    stopped = tiny_flags(shards, tmp_path / "log", max_steps=8, save_every=1, eval_every=0)
    stop_after(6, stopped)
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path / "log")] == [5, 6, 8]
    assert run_train(flags) == 0
    assert newest(tmp_path / "log")["step"] == 8


# ---------------------------------------------------------------- shards


def overwrite_shard(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\1\0")
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("change", [os.unlink, overwrite_shard, lambda path: os.truncate(path, 150)])
def test_a_shard_that_changes_while_training_ends_it_with_a_line(shards, change):
    data = sequences(shards, "train")
    expected = data.read(range(len(data)))
    assert_same(data.read(range(len(data))), expected)
    change(data.paths[1])
    first = data.ends[0]
    assert_same(data.read(range(first)), tuple(z[:first] for z in expected))
    with pytest.raises(UserError, match=f"^{data.paths[1]} was removed, replaced or changed during training: put it"):
        data.read([first])


def test_a_shard_is_the_same_on_a_file_system_whose_inodes_change(shards):
    data = sequences(shards, "train")
    expected = data.read(range(len(data)))
    other = shards / "other"
    shutil.copy2(data.paths[1], other)
    other.replace(data.paths[1])
    assert_same(data.read(range(len(data))), expected)


def test_any_number_of_shards_takes_no_more_open_files(shards):
    before = len(os.listdir("/proc/self/fd"))
    data = sequences(shards, "train")
    data.read(range(len(data)))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_run_whose_shard_is_cut_short_in_place_ends_with_one_line(shards, tmp_path):
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    process = start_forked(["train_gpt2", *tiny_flags(shards, tmp_path / "log", **LONG)], out, err)
    wait_for(lambda: checkpoint.find(tmp_path / "log"), process)
    path = next(shards.glob("*train*"))
    os.truncate(path, 100)
    process.join(60)
    assert process.exitcode == 1
    assert err.read_text().startswith(f"train_gpt2.py: {path} was removed, replaced or changed")
    assert err.read_text().count("\n") == 1


@pytest.fixture
def made(tmp_path) -> Path:
    """A folder of shards that fineweb.py made, with its manifest."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("One two three four five six seven.\n" * 200)
    folder = tmp_path / "made"
    fineweb.build(folder, fineweb.Manifest(str(texts), "", "main", 400, None))
    return folder


@pytest.mark.parametrize("damage", ["missing", "cut", "grown", "another", "incomplete"])
def test_shards_that_are_not_those_of_the_manifest_are_found_at_the_start(made, tmp_path, damage):
    flags = ["train_gpt2", *tiny_flags(made, tmp_path / "log", vocab_size=50304, max_steps=2, warmup_steps=1)]
    assert run_forked(flags, tmp_path).returncode == 0
    path = sorted(made.glob("*_train_*"))[1]
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "grown":
        path.write_bytes(path.read_bytes() + b"\0\0")
    elif damage == "another":
        np.save(path, np.load(path)[:-1])
    elif damage == "incomplete":
        manifest = fineweb.Manifest.load(made)
        manifest.complete = False
        manifest.save(made)
    result = run_forked([*flags, "--out_dir", tmp_path / "other"], tmp_path)
    assert result.returncode == 1
    assert_one_line(result)
    assert str(made if damage == "incomplete" else path) in result.stderr
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- several machines


def agent(port: int, node: str, flags: list, own_store: str = "1") -> subprocess.Popen:
    """One machine's torchrun of two, with one rank; in a process group of its own, so that it can be lost whole."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3",
               "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=1", "--local_addr=127.0.0.1",
               str(ROOT / "train_gpt2.py"), *map(str, flags)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": own_store}
    log = open(flags[flags.index("--out_dir") + 1] + f".{node}", "w")  # noqa: SIM115
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def processes_of(torchrun: subprocess.Popen) -> list[int]:
    return [torchrun.pid, *workers_of(torchrun)]


@pytest.mark.slow
def test_two_machines_train_like_one_process(shards, tmp_path):
    port, flags = free_port(), tiny_flags(shards, tmp_path / "two")
    both = [agent(port, node, flags) for node in "ab"]
    try:
        assert [process.wait(120) for process in both] == [0, 0], (tmp_path / "two.a").read_text()
    finally:
        for process in both:
            process.kill()
    assert run_train(tiny_flags(shards, tmp_path / "one")) == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert list(two.values()) == pytest.approx(list(one.values()), abs=1e-5)


@pytest.mark.slow
def test_two_machines_that_could_not_restart_say_so_at_the_start(shards, tmp_path):
    port, flags = free_port(), tiny_flags(shards, tmp_path / "log")
    both = [agent(port, node, flags, own_store="0") for node in "ab"]
    assert 0 not in [process.wait(120) for process in both]
    fix = "set the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun\n"
    assert all(fix in (tmp_path / f"log.{node}").read_text() for node in "ab")
    assert not (tmp_path / "log").exists()


@pytest.mark.slow
def test_a_lost_machine_that_is_started_again_goes_on(shards, tmp_path):
    flags = tiny_flags(shards, tmp_path / "log", **LONG | {"max_steps": 600, "save_every": 20})
    port = free_port()
    first = agent(port, "a", flags)  # it holds the rendezvous
    with socket.socket() as probe:
        wait_for(lambda: not probe.connect_ex(("127.0.0.1", port)), first)
    second = agent(port, "b", flags)
    try:
        wait_for(lambda: checkpoint.find(tmp_path / "log"), first)
        for pid in processes_of(second):
            os.kill(pid, signal.SIGKILL)
        second.wait()
        lost_at = max(losses(tmp_path / "log"))
        assert lost_at < 600
        second = agent(port, "c", flags)
        assert first.wait(240) == 0, (tmp_path / "log.a").read_text()
        assert second.wait(60) == 0, (tmp_path / "log.c").read_text()
    finally:
        for process in (first, second):
            for pid in processes_of(process) if process.poll() is None else ():
                os.kill(pid, signal.SIGKILL)
    assert list(losses(tmp_path / "log")) == list(range(1, 601))
    assert newest(tmp_path / "log")["step"] == 600
