"""Training: one step, many ranks, stops and resumptions, what is written down."""

import dataclasses
import json
import math
import os
import shutil
from unittest import mock

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
    run_forked,
    run_script,
    run_train,
    sequences,
    small_files,
    start_forked,
    stop_after,
    tiny_flags,
    wait_for,
    write_shards,
)
from transformers import GPT2Config, GPT2LMHeadModel

import train_gpt2
from support import checkpoint
from support.cli import UserError
from support.log import Log, draw_curves, read_log
from support.world import World, peak_flops
from train_gpt2 import GPT, TrainConfig, learning_rate, make_optimizer, step_batches, train_step

# ---------------------------------------------------------------- a step

ONE = TrainConfig(batch_tokens=128, micro_batch=8, warmup_steps=0, max_lr=0.5, grad_clip=0.01)


def test_accumulated_gradients_are_those_of_one_big_batch(shards):
    data = sequences(shards, "train")
    results = []
    for micro_batch in (8, 2, 1):
        model = GPT(TINY)
        config = dataclasses.replace(ONE, micro_batch=micro_batch, grad_clip=1e9)
        # Plain SGD, because AdamW divides the gradient by its own size and would hide a wrong scale.
        optimizer = torch.optim.SGD(model.parameters(), lr=config.max_lr)
        loss, norm, _ = train_step(model, optimizer, step_batches(1, data, config, 0, 1), 1, config, CPU)
        results.append((loss, norm, model.state_dict()))
    for loss, norm, weights in results[1:]:
        assert (loss, norm) == pytest.approx(results[0][:2], rel=1e-6)
        torch.testing.assert_close(weights, results[0][2])


def test_a_step_clips_the_gradient_sets_the_rate_and_gives_the_loss_before_it(shards):
    batches = step_batches(1, sequences(shards, "train"), ONE, 0, 1)
    model = GPT(TINY)
    before, expected = {n: p.clone() for n, p in model.named_parameters()}, model(*batches[0][:2])
    optimizer = torch.optim.SGD(model.parameters(), lr=ONE.max_lr)
    for group in optimizer.param_groups:
        group.update(initial_lr=ONE.max_lr, lr=99)
    loss, norm, _ = train_step(model, optimizer, batches, 1, ONE, CPU)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert norm > 0.01
    moved = math.sqrt(sum((p - before[n]).square().sum().item() for n, p in model.named_parameters()))
    assert moved == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_grad_clip_0_does_not_clip(shards):
    batches = step_batches(1, sequences(shards, "train"), ONE, 0, 1)
    results = []
    for clip in (0, 1e9):
        model = GPT(TINY)
        config = dataclasses.replace(ONE, grad_clip=clip)
        train_step(model, torch.optim.SGD(model.parameters(), lr=config.max_lr), batches, 1, config, CPU)
        results.append(model.state_dict())
    assert_same(*results)
    assert not torch.equal(results[0]["lm_head.weight"], GPT(TINY).lm_head.weight)


def test_bfloat16_is_for_matrix_products_and_weights_stay_float32(shards, tmp_path):
    assert run_train(tiny_flags(shards, tmp_path / "float32")) == 0
    assert run_train(tiny_flags(shards, tmp_path / "log", dtype="bfloat16")) == 0
    exact, rounded = list(losses(tmp_path / "float32").values()), list(losses(tmp_path / "log").values())
    assert rounded != exact
    assert rounded == pytest.approx(exact, abs=0.05)
    assert all(w.dtype == torch.float32 for w in newest(tmp_path / "log")["model"].values())


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
     ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA GeForce RTX 4090", 165.2e12),
     ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None), ("NVIDIA A10G", None)],
)  # fmt: skip
def test_the_peak_is_known_for_known_gpus_only(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    assert peak_flops(cuda, torch.bfloat16) == peak
    assert peak_flops(cuda, torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_gpt2_124m_takes_0_855_gflop_a_token():
    assert GPT(train_gpt2.GPTConfig(), seed=None).flops_per_token() == pytest.approx(0.855e9, rel=1e-3)


def test_the_learning_rate_warms_up_linearly_then_follows_a_cosine():
    config = TrainConfig()
    assert learning_rate(1, config) == pytest.approx(6e-4 / 715)
    assert learning_rate(715, config) == pytest.approx(6e-4)
    assert learning_rate(716, config) == pytest.approx(6e-4)
    assert learning_rate(715 + 1 + (19073 - 715) // 2, config) == pytest.approx(3.3e-4)
    assert 6e-5 < learning_rate(19073, config) < 6.0001e-5


def test_weight_decay_is_for_tensors_of_two_dimensions_or_more_and_adamw_is_fused():
    model = GPT(TINY)
    optimizer = make_optimizer(model, TrainConfig())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for p in model.parameters():
        assert decay[id(p)] == (0.1 if p.dim() >= 2 else 0.0)
    assert all(
        group["fused"] and group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in optimizer.param_groups
    )


# ---------------------------------------------------------------- a run


@pytest.mark.picture
def test_a_run_learns_and_logs_what_happened(shards, tmp_path, capsys):
    out = tmp_path / "log"
    assert run_train(tiny_flags(shards, out, sample_every=6, max_length=20)) == 0
    events = read_log(out / "log.jsonl")
    assert list(events["train"]) == [1, 2, 3, 4, 5, 6]
    assert list(events["val"]) == [0, 3, 6]
    assert events["val"][6]["loss"] < events["val"][0]["loss"]
    assert events["val"][6]["tokens"] == 160
    start = events["start"][0]
    names = {f.name for config in (train_gpt2.TrainConfig, train_gpt2.GPTConfig) for f in dataclasses.fields(config)}
    assert names <= start.keys()
    assert {"torch", "device", "world_size"} <= start.keys()
    entry = events["train"][2]
    assert entry.keys() >= {"loss", "lr", "grad_norm", "ms", "tokens_per_s", "mfu"}
    assert entry["tokens_per_s"] * entry["ms"] / 1000 == pytest.approx(128)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in checkpoint.find(out)] == ["ckpt_000004.pt", "ckpt_000006.pt"]
    assert newest(out).keys() == {"model", "optimizer", "step", "GPTConfig", "TrainConfig"}
    assert not list(out.glob("*.tmp"))
    assert "step     6/6 | loss" in capsys.readouterr().out


def test_validation_at_step_0_is_of_the_untrained_model(shards, tmp_path):
    run_train(tiny_flags(shards, tmp_path / "log"))
    data = sequences(shards, "val")
    expected = GPT(TINY, seed=1337)(*data.read(range(10))).item()
    assert read_log(tmp_path / "log" / "log.jsonl")["val"][0]["loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("ranks", "micro_batch"), [(3, 2), pytest.param(7, 3, marks=pytest.mark.slow)])
def test_ranks_that_do_not_divide_the_batch_train_like_one(unbroken, shards, tmp_path, ranks, micro_batch):
    flags = tiny_flags(shards, tmp_path / "log", save_every=1, micro_batch=micro_batch)
    result = run_forked(["train_gpt2", *flags], tmp_path, ranks=ranks)
    assert result.returncode == 0, result.stderr
    assert list(losses(tmp_path / "log").values()) == pytest.approx(list(losses(unbroken[0]).values()), abs=1e-5)
    for name, weight in newest(unbroken[0])["model"].items():
        torch.testing.assert_close(newest(tmp_path / "log")["model"][name], weight, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_run_begun_on_two_ranks_goes_on_on_three(unbroken, shards, tmp_path):
    flags = ["train_gpt2", *tiny_flags(shards, tmp_path / "log", save_every=1, max_steps=6)]
    assert run_forked(flags, tmp_path, ranks=2, hook="sigterm_at_step_3").returncode == 0
    assert newest(tmp_path / "log")["step"] == 3
    assert run_forked(flags, tmp_path, ranks=3).returncode == 0
    assert list(losses(tmp_path / "log").values()) == pytest.approx(list(losses(unbroken[0]).values()), abs=1e-5)


def test_two_ranks_train_like_one(shards, tmp_path):
    run_train(tiny_flags(shards, tmp_path / "one", micro_batch=8))
    result = run_forked(["train_gpt2", *tiny_flags(shards, tmp_path / "two", micro_batch=2)], tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert list(two.values()) == pytest.approx(list(one.values()), abs=1e-5)
    validation = [[e["loss"] for e in read_log(tmp_path / n / "log.jsonl")["val"].values()] for n in ("one", "two")]
    assert validation[1] == pytest.approx(validation[0], abs=1e-5)
    assert newest(tmp_path / "two")["model"].keys() == GPT(TINY).state_dict().keys()
    assert result.stdout.count("step     6/6") == 1
    assert sum('"train"' in line for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()) == 6


@pytest.mark.slow
def test_eight_ranks_of_torchrun_train_like_one(shards, tmp_path):
    run_train(tiny_flags(shards, tmp_path / "one", micro_batch=8))
    result = run_script(["train_gpt2.py", *tiny_flags(shards, tmp_path / "eight", micro_batch="auto")], ranks=8)
    assert result.returncode == 0, result.stderr
    one, eight = losses(tmp_path / "one"), losses(tmp_path / "eight")
    assert one.keys() == eight.keys()
    assert list(eight.values()) == pytest.approx(list(one.values()), abs=1e-5)


def test_a_rank_that_fails_ends_the_job(shards, tmp_path):
    # The first rank goes on into a collective that the second one never joins.
    flags = tiny_flags(shards, tmp_path / "log")
    result = run_forked(["train_gpt2", *flags], tmp_path, ranks=2, hook="fail_on_rank_1")
    assert result.returncode != 0
    assert "train_gpt2.py [rank 1]: rank 1 fails here" in result.stderr


@pytest.mark.slow
def test_compile_validation_and_sampling_work_in_one_run(shards, tmp_path, capsys):
    assert run_train(tiny_flags(shards, tmp_path / "eager")) == 0
    flags = tiny_flags(shards, tmp_path / "log", compile=True, sample_every=3, max_length=20)
    torch._dynamo.reset()
    assert run_train(flags) == 0
    out, err = capsys.readouterr()
    assert "warning" not in err
    assert out.count("step     3 | sample: !") == out.count("step     6 | sample: !") == 4
    assert list(read_log(tmp_path / "log" / "log.jsonl")["val"]) == [0, 3, 6]
    compiled, eager = losses(tmp_path / "log"), losses(tmp_path / "eager")
    assert list(compiled.values()) == pytest.approx(list(eager.values()), abs=1e-4)
    assert newest(tmp_path / "log")["model"].keys() == GPT(TINY).state_dict().keys()


@pytest.mark.slow
def test_without_a_compiler_there_is_a_warning_and_training_goes_on(shards, tmp_path):
    env = {"PATH": "/nonexistent", "CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags = tiny_flags(shards, tmp_path / "log", compile=True, max_steps=3, eval_every=0)
    result = run_script(["train_gpt2.py", *flags], env=env)
    assert result.returncode == 0, result.stderr
    assert "warning: torch.compile does not work here" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(losses(tmp_path / "log")) == 3


def train_where_compiling_fails(failing: int, rank: int, port: int, flags: list[str]) -> None:
    class Compiled(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            if rank == failing:
                raise RuntimeError("out of resource: shared memory")
            return self.model(x, y)

    def check(step, model):
        assert not isinstance(model, Compiled)

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    with mock.patch("torch.compile", lambda model, dynamic: Compiled(model)), before_each_step(check):
        assert run_train(flags) == 0


@pytest.mark.parametrize("failing", [0, 1])
def test_a_model_that_cannot_be_compiled_on_one_rank_trains_without_on_all(unbroken, shards, tmp_path, failing):
    flags, port = tiny_flags(shards, tmp_path / "log", compile=True), free_port()
    processes = []
    for rank in (0, 1):
        arguments = (train_where_compiling_fails, (failing, rank, port, flags), None, str(tmp_path / f"{rank}"))
        processes.append(forkserver().Process(target=be_a_child, args=arguments))
        processes[-1].start()
    for process in processes:
        end(process, 60)
    err = "".join((tmp_path / f"{rank}").read_text() for rank in (0, 1))
    assert [process.exitcode for process in processes] == [0, 0], err
    why = "out of resource: shared memory" if failing == 0 else "it failed on another rank"
    assert err == f"warning: torch.compile does not work here, continuing without it ({why})\n"
    assert list(losses(tmp_path / "log").values()) == pytest.approx(list(losses(unbroken[0]).values()), abs=1e-5)


# ---------------------------------------------------------------- stop and resume


def test_tied_weights_are_written_once_from_a_gpu_too(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)  # as from a GPU, it is another tensor each time
    assert run_train(tiny_flags(shards, tmp_path / "log", max_steps=1, warmup_steps=0)) == 0
    weights = newest(tmp_path / "log")["model"]
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()


@pytest.fixture
def unbroken(shards, tmp_path):
    """The folder of a finished run of six steps, over two epochs, and its flags."""
    out = tmp_path / "unbroken"
    flags = tiny_flags(shards, out, save_every=1)
    assert run_train(flags) == 0
    return out, flags


def continue_from(step, shards, tmp_path, **changes):
    """Run to `step` and stop, as a run that saves then and is killed; then the same command again to the end."""
    out = tmp_path / f"from_{step}"
    flags = tiny_flags(shards, out, save_every=1, **changes)
    stop_after(step, flags)
    kept = losses(out)
    assert list(kept) == list(range(1, step + 1))
    assert run_train(flags) == 0
    return out, kept


@pytest.mark.parametrize("step", [1, 3, 5])  # step 3 and step 5 hold the ends of epochs
def test_a_resumed_run_is_bitwise_the_unbroken_one(unbroken, shards, tmp_path, step):
    out, kept = continue_from(step, shards, tmp_path)
    expected, found = newest(unbroken[0]), newest(out)
    for key in ("model", "optimizer", "step", "GPTConfig"):
        assert_same(found[key], expected[key])
    assert losses(out) == losses(unbroken[0])
    assert kept == {s: loss for s, loss in losses(unbroken[0]).items() if s <= step}


def test_a_killed_run_goes_on_with_the_same_command(unbroken, shards, tmp_path):
    out = tmp_path / "killed"
    flags = tiny_flags(shards, out, save_every=1)
    process = start_forked(["train_gpt2", *flags], tmp_path / "stdout", tmp_path / "stderr")
    wait_for(lambda: checkpoint.find(out), process)
    process.kill()
    process.join()
    result = run_forked(["train_gpt2", *flags], tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same(newest(out)["model"], newest(unbroken[0])["model"])
    assert losses(out) == losses(unbroken[0])


@pytest.mark.slow
def test_a_run_resumes_compiled_on_other_ranks_and_micro_batches_with_the_same_batches(unbroken, shards, tmp_path):
    out = tmp_path / "moved"
    stop_after(3, tiny_flags(shards, out, save_every=1))
    flags = tiny_flags(shards, out, save_every=1, micro_batch=2, compile=True)
    result = run_forked(["train_gpt2", *flags], tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr
    assert "step 3 to 6" in result.stdout
    assert "warning" not in result.stderr
    assert list(losses(out).values()) == pytest.approx(list(losses(unbroken[0]).values()), abs=1e-5)


def test_an_interrupted_save_keeps_the_old_checkpoint(unbroken, monkeypatch):
    out, _ = unbroken
    before = newest(out)
    real = torch.save

    def half(state, file):
        real(state, file)
        file.truncate(1000)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    model = GPT(TINY, seed=5)
    config = TrainConfig(out_dir=str(out))
    for step in (6, 7):
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(model, make_optimizer(model, config), step, config)
    monkeypatch.undo()
    assert_same(newest(out), before)
    assert not list(out.glob("*.tmp"))


def test_a_finished_run_stays_as_it_is(unbroken, capsys):
    out, flags = unbroken
    before = newest(out)
    assert run_train(flags) == 0
    assert_same(newest(out), before)
    assert len(losses(out)) == 6


@pytest.mark.parametrize(
    ("change", "field"),
    [({"n_layer": 1}, "n_layer"), ({"max_lr": 2e-2}, "max_lr"), ({"warmup_steps": 1}, "warmup_steps"),
     ({"seed": 3}, "seed"), ({"batch_tokens": 64}, "batch_tokens"), ({"max_steps": 8}, "max_steps"),
     ({"max_steps": 5}, "max_steps"), ({"max_steps": 5, "extend": True}, "max_steps")],
)  # fmt: skip
def test_a_changed_shape_or_schedule_is_refused_by_name(unbroken, shards, capsys, change, field):
    out, _ = unbroken
    before = newest(out)
    assert run_train(tiny_flags(shards, out, save_every=1, **change)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train_gpt2.py: --{field} is {change[field]}")
    assert error.count("\n") == 1
    assert_same(newest(out), before)


def test_max_steps_grows_when_the_user_says_so(unbroken, shards):
    out, _ = unbroken
    assert run_train(tiny_flags(shards, out, max_steps=8, extend=True)) == 0
    assert list(losses(out)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert newest(out)["step"] == 8


def test_other_shards_than_the_run_began_with_are_refused(unbroken, shards, capsys):
    out, flags = unbroken
    write_shards(shards, [100])
    capsys.readouterr()
    assert run_train(tiny_flags(shards, out, max_steps=8, extend=True)) == 1
    assert "has 438 train tokens, but had 338" in capsys.readouterr().err
    assert newest(out)["step"] == 6


def test_what_does_not_matter_may_change(unbroken, shards, tmp_path):
    out, _ = unbroken
    moved = shutil.copytree(out, tmp_path / "elsewhere")
    for path in checkpoint.find(moved)[1:]:
        path.unlink()  # so that step 6 is taken once more
    changes = {"eval_every": 1, "save_every": 4, "val_tokens": 32, "micro_batch": 2, "dtype": "bfloat16"}
    assert run_train(tiny_flags(shards, moved, **changes)) == 0
    assert losses(moved)[6] == pytest.approx(losses(out)[6], abs=0.05)


def test_no_resume_never_overwrites_a_run(unbroken, capsys):
    out, flags = unbroken
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run_train([*flags, "--no-resume"]) == 2
    assert "another --out_dir" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_log_line_cut_by_a_kill_harms_no_other(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"event": "train", "step": 1, "loss": 2.0}) + '\n{"event": "train", "st')
    log = Log(tmp_path, CPU)
    log.write("train", 2, loss=1.0)
    log.write("train", 2, loss=0.5)
    del log  # which has the file locked
    Log(tmp_path, CPU)
    assert {step: entry["loss"] for step, entry in read_log(path)["train"].items()} == {1: 2.0, 2: 0.5}
    assert len(path.read_text().splitlines()) == 4


def test_a_log_without_what_a_new_run_undid(tmp_path):
    log = Log(tmp_path, CPU)
    log.write("start", 0)
    for step in (1, 2, 3):
        log.write("train", step, loss=1.0)
    log.write("start", 1)
    log.write("train", 2, loss=0.5)
    assert {step: entry["loss"] for step, entry in read_log(log.path)["train"].items()} == {1: 1.0, 2: 0.5}


@pytest.mark.slow
def test_a_file_that_cannot_be_written_in_full_leaves_the_old_checkpoint_and_one_line(shards, tmp_path):
    flags = tiny_flags(shards, tmp_path / "log", n_embd=64, eval_every=0)
    result = run_script(["train_gpt2.py", *flags], preexec_fn=small_files(300_000))
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "ckpt_000002.pt" in result.stderr
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == [".lock", "log.jsonl"]


def test_training_goes_on_from_weights_of_transformers_and_resumes(shards, tmp_path, capsys):
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2, vocab_size=96))
    theirs.save_pretrained(tmp_path / "hf")
    flags = tiny_flags(shards, tmp_path / "log", init_from=tmp_path / "hf", save_every=1)
    stop_after(3, flags)
    assert run_train(flags) == 0
    first = read_log(tmp_path / "log" / "log.jsonl")["val"][0]["loss"]
    x, y = sequences(shards, "val").read(range(10))
    expected = torch.nn.functional.cross_entropy(theirs.eval()(x).logits.flatten(0, 1), y.flatten()).item()
    assert first == pytest.approx(expected, abs=1e-4)
    assert list(losses(tmp_path / "log")) == [1, 2, 3, 4, 5, 6]
    capsys.readouterr()
    assert run_train(tiny_flags(shards, tmp_path / "log")) == 2
    assert "--init_from is scratch" in capsys.readouterr().err


@pytest.mark.parametrize(("data", "lines"), [("edufineweb", 1), ("demo", 0)])
def test_reference_lines_are_drawn_only_where_the_data_are_the_same(tmp_path, monkeypatch, data, lines):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **style: drawn.append(y))
    log = Log(tmp_path, CPU)
    log.write("start", 0, data=data, block_size=1024, batch_tokens=8, parameters=1)
    log.write("val", 0, loss=3.0, tokens=8)
    draw_curves(log.path, tmp_path / "curves.png")
    assert drawn == [3.2924] * lines


def test_ranks_that_see_different_checkpoints_stop(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(World, "sum", lambda self, *values: [values[0] + 4])
    config = TrainConfig(
        data_dir=str(shards), out_dir=str(tmp_path / "log"), batch_tokens=128, micro_batch=4, compile=False
    )
    with pytest.raises(UserError, match="different checkpoints"):
        train_gpt2.train(TINY, config, train_gpt2.SampleConfig(top_k=50, prompt="!"), CPU)
