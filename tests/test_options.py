"""Options for small corpora, older GPUs and long runs: dropout, float16, the best checkpoint, fewer lines, tracking."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import types

import pytest
import torch
from conftest import (
    CPU,
    ROOT,
    TINY,
    assert_resumes_bitwise,
    assert_same,
    losses,
    newest,
    run_forked,
    run_train,
    sequences,
    stop_after,
    tiny_flags,
)

from support import checkpoint
from support.cli import UserError
from support.log import Log, read_log
from support.tokens import RANKS_FILE
from support.world import World
from train_gpt2 import GPT, TrainConfig, load_model, make_optimizer, step_batches, train_step

FLOAT16 = World(0, 1, torch.device("cpu"), torch.float16)

# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_with_dropout_a_resumed_run_is_bitwise_the_unbroken_one(shards, tmp_path, optimizer):
    def flags(shards, out, **changes):
        torch.rand(1)  # what others draw makes no difference
        return tiny_flags(shards, out, dropout=0.2, optimizer=optimizer, **changes)

    assert_resumes_bitwise(flags, shards, tmp_path)


def test_dropout_drops_in_training_alone_and_differs_by_step_and_rank(shards, tmp_path):
    assert run_train(tiny_flags(shards, tmp_path / "none")) == 0
    assert run_train(tiny_flags(shards, tmp_path / "some", dropout=0.5)) == 0
    none, some = (read_log(tmp_path / name / "log.jsonl") for name in ("none", "some"))
    assert none["val"][0]["loss"] == some["val"][0]["loss"]
    assert none["train"][1]["loss"] != some["train"][1]["loss"]
    model = GPT(TINY)
    for module in (model, *model.transformer.h):
        module.dropout = 0.5
    config = TrainConfig(batch_tokens=64, micro_batch=4, dropout=0.5, max_lr=1e-9, min_lr=0.0)
    data = sequences(shards, "train")
    batches, found = step_batches(1, data, config, 0, 1), []
    for step, rank in ((1, 0), (1, 0), (2, 0), (1, 1)):
        world = World(rank, 1, CPU.device, CPU.dtype)
        found.append(train_step(model, make_optimizer(model, config), batches, step, config, world)[0])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert len({round(loss, 4) for loss in found}) == 3


def test_dropout_scales_what_it_keeps_and_is_the_same_recomputed(shards, tmp_path):
    assert run_train(tiny_flags(shards, tmp_path / "kept", dropout=0.3)) == 0
    assert run_train(tiny_flags(shards, tmp_path / "recomputed", dropout=0.3, recompute=True)) == 0
    assert losses(tmp_path / "kept") == losses(tmp_path / "recomputed")


@pytest.mark.parametrize("dropout", [1, 1.5, -0.1])
def test_dropout_out_of_its_bounds_is_refused(shards, tmp_path, capsys, dropout):
    assert run_train(tiny_flags(shards, tmp_path / "log", dropout=dropout)) == 2
    assert f"--dropout {float(dropout)} must be at least 0, and below 1" in capsys.readouterr().err


# ---------------------------------------------------------------- float16


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_run_in_float16_learns_resumes_bitwise_and_keeps_its_scale(shards, tmp_path, optimizer):
    def flags(shards, out, **changes):
        return tiny_flags(shards, out, dtype="float16", optimizer=optimizer, **changes)

    assert_resumes_bitwise(flags, shards, tmp_path)
    assert newest(tmp_path / "stopped")["scaler"]["_growth_tracker"] == 6
    assert_same(newest(tmp_path / "stopped")["scaler"], newest(tmp_path / "unbroken")["scaler"])
    exact = tiny_flags(shards, tmp_path / "float32", optimizer=optimizer)
    assert run_train(exact) == 0
    rounded, expected = (list(losses(tmp_path / name).values()) for name in ("stopped", "float32"))
    assert rounded != expected
    assert rounded == pytest.approx(expected, abs=0.05)


def test_a_step_that_overflows_float16_is_skipped_and_the_scale_is_halved(shards):
    model, config = GPT(TINY), TrainConfig(batch_tokens=128, micro_batch=4)
    world, optimizer = dataclasses.replace(FLOAT16), make_optimizer(model, config)
    batches = step_batches(1, sequences(shards, "train"), config, 0, 1)
    hook = model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    loss, norm, _ = train_step(model, optimizer, batches, 1, config, world)
    assert math.isfinite(loss)
    assert not math.isfinite(norm)
    assert_same({**model.state_dict()}, before)
    assert world.scaler.get_scale() == 2**15
    hook.remove()
    _, norm, _ = train_step(model, optimizer, batches, 2, config, world)
    assert 0.01 < norm < 100  # unscaled
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    model.register_forward_hook(lambda module, inputs, loss: loss * math.nan)
    with pytest.raises(UserError, match="^step 3: loss nan"):
        train_step(model, optimizer, batches, 3, config, world)


def test_skipped_steps_are_counted_and_the_log_stays_json(tmp_path, capsys):
    log = Log(tmp_path, CPU)
    log.mfu_of_a_token, log.max_steps, log.print_every = None, 4, 1
    for step, norm in enumerate((1.0, math.inf, 2.0, math.nan), 1):
        log.train(step, 3.0, norm, 1e-3, 128, 1.0, 10)
    lines = capsys.readouterr().out.splitlines()
    assert ["skipped" in line for line in lines] == [False, True, True, True]
    assert "| 2 skipped |" in lines[3]
    entries = [json.loads(line, parse_constant=pytest.fail) for line in log.path.read_text().splitlines()]
    assert [entry["grad_norm"] for entry in entries] == [1.0, None, 2.0, None]


@pytest.mark.slow
def test_two_ranks_in_float16_skip_together(shards, tmp_path):
    flags = ["train_gpt2", *tiny_flags(shards, tmp_path / "log", dtype="float16", save_every=1)]
    result = run_forked(flags, tmp_path, ranks=2, hook="overflow_at_step_3_on_rank_1")
    assert result.returncode == 0, result.stderr
    norms = [entry["grad_norm"] for entry in read_log(tmp_path / "log" / "log.jsonl")["train"].values()]
    assert [norm is None for norm in norms] == [False, False, True, False, False, False]
    assert result.stdout.count("| 1 skipped |") == 4


# ---------------------------------------------------------------- the best checkpoint


def test_keep_best_keeps_the_lowest_validation_loss_through_a_resume(shards, tmp_path):
    flags = tiny_flags(shards, tmp_path / "log", eval_every=1, save_every=2, keep_best=True, max_lr=2, warmup_steps=1)
    stop_after(3, flags)
    assert run_train(flags) == 0
    measured = {step: entry["loss"] for step, entry in read_log(tmp_path / "log" / "log.jsonl")["val"].items()}
    best = min(measured, key=measured.get)
    assert 0 <= best < 6  # such a rate diverges
    path = tmp_path / "log" / "ckpt_best.pt"
    assert checkpoint.read(path)["step"] == best
    assert [found.name for found in checkpoint.find(tmp_path / "log")] == ["ckpt_000004.pt", "ckpt_000006.pt"]
    assert run_train(["--export", tmp_path / "out", "--init_from", path]) in (0, 1)  # 1: TINY has no GPT-2's vocabulary
    assert torch.equal(load_model(str(path)).lm_head.weight, checkpoint.read(path)["model"]["lm_head.weight"])


# ---------------------------------------------------------------- console and log


def test_step_lines_fit_80_columns_even_in_the_longest_run(tmp_path, capsys):
    log = Log(tmp_path, CPU)
    log.mfu_of_a_token, log.max_steps, log.print_every = 0.4567 / 2_140_123, 19073, 1
    log.train(19072, 3.29241, 0.3123, 6e-5, 524_288, 524_288 / 2_140_123, 40 * 3600 * 2_140_123)
    line = capsys.readouterr().out.rstrip("\n")
    assert line == "step 19072/19073 | loss 3.2924 | norm 0.31 | 2,140k/s | MFU 46% | 40:00:00 left"
    assert len(line) <= 80


@pytest.mark.parametrize(
    ("max_steps", "flags", "expected"),
    [(6, {}, [1, 2, 3, 4, 5, 6]), (6, {"print_every": 4}, [4, 6]), (2001, {}, [*range(10, 2001, 10), 2001])],
)
def test_print_every_thins_the_console_and_the_log_has_every_step(tmp_path, capsys, max_steps, flags, expected):
    log, model = Log(tmp_path, CPU), GPT(TINY)
    data = types.SimpleNamespace(n_tokens=5, paths=[tmp_path / "tiny_train_1.npy"])
    config = TrainConfig(max_steps=max_steps, warmup_steps=1, **flags)
    log.begin(0, model, make_optimizer(model, config), data, config, config)
    for step in range(1, max_steps + 1):
        log.train(step, 3.0, 1.0, 1e-3, 128, 1.0, 10)
    lines = [line for line in capsys.readouterr().out.splitlines() if "left" in line]
    assert [int(line[5:].split("/")[0]) for line in lines] == expected
    assert len(read_log(log.path)["train"]) == max_steps


def test_lines_of_the_log_have_the_time_of_day_and_samples_are_events(shards, tmp_path):
    assert run_train(tiny_flags(shards, tmp_path / "log", sample_every=3, num_samples=2, max_length=8)) == 0
    events = read_log(tmp_path / "log" / "log.jsonl")
    assert list(events["sample"]) == [3, 6]
    assert len(events["sample"][6]["texts"]) == 2
    assert events["sample"][6]["texts"][0].startswith("!")
    for entries in events.values():
        for entry in entries.values():
            assert entry["time"][:2] == "20"
            assert entry["time"][10] == "T"
            assert entry["time"][-6] in "+-"  # the zone


# ---------------------------------------------------------------- tracking


@pytest.mark.parametrize("package", ["wandb", pytest.param("trackio", marks=pytest.mark.slow)])
def test_what_the_log_gets_is_tracked_and_a_resumed_run_goes_on_in_the_same(shards, tmp_path, monkeypatch, package):
    begun, sent = [], {}
    module = types.ModuleType(package)
    module.init = lambda **settings: begun.append(settings)
    module.log = lambda values, step: sent.setdefault(step, {}).update(values)
    module.finish = lambda: begun[-1].update(finished=True)
    monkeypatch.setitem(sys.modules, package, module)
    flags = tiny_flags(shards, tmp_path / "log", track=package, save_every=1)
    stop_after(3, flags)
    assert run_train(flags) == 0
    assert begun[0]["name"] == begun[1]["name"]
    assert begun[0].get("id") == (begun[0]["name"] if package == "wandb" else None)
    assert begun[0]["finished"]
    assert begun[1]["finished"]
    assert begun[0]["resume"] == begun[1]["resume"] == "allow"
    assert begun[0]["config"]["max_lr"] == 0.01
    assert {step: values["train/loss"] for step, values in sent.items() if step} == losses(tmp_path / "log")
    assert sent[6]["val/loss"] == read_log(tmp_path / "log" / "log.jsonl")["val"][6]["loss"]
    assert run_train(tiny_flags(shards, tmp_path / "other", track=package)) == 0
    assert begun[2]["name"] != begun[0]["name"]


@pytest.mark.parametrize("what", ["init", "log", "finish"])
def test_what_fails_in_tracking_is_one_line_and_ends_no_run_that_has_begun(shards, tmp_path, monkeypatch, capsys, what):
    def fail(*args, **kwargs):
        raise RuntimeError("no API key\nconfigured")

    module = types.ModuleType("wandb")
    module.init = module.log = module.finish = lambda *args, **kwargs: None
    setattr(module, what, fail)
    monkeypatch.setitem(sys.modules, "wandb", module)
    flags = tiny_flags(shards, tmp_path / "log", track="wandb")
    begins = what == "init"
    assert run_train(flags) == (1 if begins else 0)
    said = "train_gpt2.py: --track wandb" if begins else "warning: continuing without --track"
    assert capsys.readouterr().err == f"{said}: no API key configured\n"
    assert ("train" in read_log(tmp_path / "log" / "log.jsonl")) == (not begins)
    assert "WANDB_RUN_ID" not in os.environ
    module.init = lambda *args, **kwargs: None
    assert run_train(flags) == 0  # no lock is left


def test_a_package_for_tracking_that_is_missing_is_one_line(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run_train(tiny_flags(shards, tmp_path / "log", track="wandb")) == 1
    assert capsys.readouterr().err == "train_gpt2.py: --track wandb: run `pip install wandb` first\n"
    assert "--track" not in (tmp_path / "log" / "log.jsonl").read_text()


# ---------------------------------------------------------------- a checkout by Git for Windows


def test_a_checkout_that_converts_line_ends_keeps_the_files_that_must_not_change(tmp_path):
    command = ["git", "clone", "-q", "-c", "core.autocrlf=true", str(ROOT), str(tmp_path / "clone")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no git, or no repository")
    for name in (RANKS_FILE.relative_to(ROOT), ".ci/run", "train_gpt2.py", "assets/slurm.sh"):
        assert b"\r\n" not in (tmp_path / "clone" / name).read_bytes()
