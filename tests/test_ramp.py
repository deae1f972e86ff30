"""The batch-size ramp: how many tokens a step has, and that nothing else depends on it."""

import itertools

import pytest
import torch
from conftest import (
    CPU,
    assert_same,
    before_each_step,
    losses,
    newest,
    run_forked,
    run_train,
    sequences,
    stop_after,
    tiny_flags,
)

import train_gpt2
from support.cli import UserError
from support.log import Log, draw_curves, read_log
from support.order import sequences_at
from train_gpt2 import TrainConfig, check_batch, step_batches, tokens_before, tokens_of

# 16 sequences of 16 tokens a step, from 4 on, over five steps; the shards have 20.
RAMP = {"batch_tokens": 256, "batch_ramp_from": 64, "batch_ramp_steps": 5}
SIZES = [64, 128, 128, 192, 192, 256, 256]


def test_the_tokens_of_a_step_rise_linearly_in_multiples_of_the_first():
    assert [tokens_of(step, TrainConfig(**RAMP)) for step in range(1, 8)] == SIZES
    config = TrainConfig(batch_ramp_steps=1000)
    sizes = [tokens_of(step, config) for step in range(1, 1003)]
    assert sizes[0] == 32768
    assert sizes[1000:] == [524288, 524288]
    for done, size in enumerate(sizes[:1000]):
        line = 32768 + (524288 - 32768) * done / 1000
        assert abs(size - line) <= 32768 / 2
        assert size % 32768 == 0
    assert sizes == sorted(sizes)
    # A unit that does not divide the whole, and one as large as half of it.
    assert [tokens_of(step, TrainConfig(batch_tokens=176, batch_ramp_from=48, batch_ramp_steps=9)) for step in
            range(1, 11)] == [48, 48, 96, 96, 96, 96, 144, 144, 144, 176]  # fmt: skip
    above = TrainConfig(batch_tokens=176, batch_ramp_from=64, batch_ramp_steps=8)  # to the nearest, it would reach 192
    assert [tokens_of(step, above) for step in range(1, 10)] == [64, 64, 64, 128, 128, 128, 128, 176, 176]
    coarse = TrainConfig(batch_tokens=256, batch_ramp_from=128, batch_ramp_steps=6)
    assert [tokens_of(step, coarse) for step in range(1, 8)] == [128, 128, 128, 256, 256, 256, 256]


def test_without_a_ramp_every_step_has_all_tokens():
    config = TrainConfig()
    assert {tokens_of(step, config) for step in range(1, 100)} == {524288}
    assert [tokens_before(step, config) for step in (1, 2, 19074)] == [0, 524288, 19073 * 524288]


def test_where_a_step_begins_is_the_sum_of_those_before_it_without_adding_them_up():
    for first, full, ramp in itertools.product((16, 48, 64), (64, 112, 256, 992), (0, 1, 2, 7, 40)):
        config = TrainConfig(batch_tokens=full, batch_ramp_from=first, batch_ramp_steps=ramp)
        total = 0
        for step in range(1, ramp + 4):
            assert tokens_before(step, config) == total
            total += tokens_of(step, config)


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (1, 8), (1, 16), (2, 4), (2, 8), (4, 4)])
def test_global_batch_of_a_ramp_does_not_depend_on_ranks_or_micro_batch(shards, ranks, micro_batch):
    data = sequences(shards, "train")
    config = TrainConfig(micro_batch=micro_batch, **RAMP)
    check_batch(config, 16, ranks)
    order = sequences_at(range(4 * len(data)), len(data), config.seed)
    position, shapes = 0, set()
    for step, size in enumerate(SIZES, 1):
        batches = [part for rank in range(ranks) for part in step_batches(step, data, config, rank, ranks)]
        expected = data.read(order[position : position + size // 16])
        assert torch.equal(torch.cat([x for x, _, _ in batches]), expected[0])
        assert torch.equal(torch.cat([y for _, y, _ in batches]), expected[1])
        sizes = {len(x) for x, _, _ in batches}
        assert len(sizes) == 1  # else their mean would not be that of the batch
        assert max(sizes) <= micro_batch
        shapes |= sizes
        position += size // 16
    assert len(shapes) <= 2  # each is compiled once
    assert sizes == {micro_batch}


def ramp_flags(shards, out, **changes):
    return tiny_flags(shards, out, max_steps=7, save_every=1, **RAMP | changes)


def test_a_ramp_is_logged_trains_on_two_ranks_like_on_one_and_resumes_bitwise(shards, tmp_path):
    assert run_train(ramp_flags(shards, tmp_path / "one")) == 0
    entries = read_log(tmp_path / "one" / "log.jsonl")["train"].values()
    assert [e["tokens"] for e in entries] == SIZES
    for e in entries:
        assert e["tokens_per_s"] * e["ms"] / 1000 == pytest.approx(e["tokens"])
        assert e["lr"] == train_gpt2.learning_rate(
            e["step"], TrainConfig(max_steps=7, warmup_steps=2, max_lr=1e-2, min_lr=1e-3)
        )

    result = run_forked(["train_gpt2", *ramp_flags(shards, tmp_path / "two", micro_batch=2)], tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two.values()) == pytest.approx(list(one.values()), abs=1e-5)

    for step in (2, 5):
        flags = ramp_flags(shards, tmp_path / f"from_{step}")
        stop_after(step, flags)
        assert run_train(flags) == 0
        assert losses(tmp_path / f"from_{step}") == one
        assert_same(newest(tmp_path / f"from_{step}")["model"], newest(tmp_path / "one")["model"])


def test_a_ramp_of_one_size_and_no_ramp_are_the_same_to_the_bit(shards, tmp_path):
    assert run_train(tiny_flags(shards, tmp_path / "off")) == 0
    assert run_train(tiny_flags(shards, tmp_path / "on", batch_ramp_steps=4, batch_ramp_from=128)) == 0
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    assert_same(newest(tmp_path / "on")["model"], newest(tmp_path / "off")["model"])


def test_time_left_counts_tokens_not_steps(shards, tmp_path, capsys, monkeypatch):
    seconds = [0]
    monkeypatch.setattr(train_gpt2.time, "perf_counter", lambda: seconds[-1])
    with before_each_step(lambda step, model: seconds.append(step)):  # each step takes a second
        assert run_train(ramp_flags(shards, tmp_path / "log", eval_every=0)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step") and "left" in line]
    # 1,216 tokens in all: what is left, over the median of the speeds so far.
    expected = [1152 / 64, 1024 / 96, 896 / 128, 704 / 128, 512 / 128, 256 / 160, 0]
    assert [line.split(" | ")[-1] for line in lines] == [f"0:00:{round(seconds):02} left" for seconds in expected]
    assert "| 192/s |" in lines[4]


def test_the_picture_shows_the_tokens_of_a_ramp(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, real = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, *args, **style: drawn.append(x) or real(self, x, *args, **style))
    log = Log(tmp_path, CPU)
    log.write("start", 0, data="x", block_size=16, parameters=1, **RAMP)
    for step, size in enumerate(SIZES, 1):
        log.write("train", step, loss=3.0, tokens=size)
    for step in (0, 3, 7):
        log.write("val", step, loss=3.0, tokens=8)
    draw_curves(log.path, tmp_path / "curves.png")
    expected = [[sum(SIZES[:step]) for step in range(1, 8)], [0, sum(SIZES[:3]), sum(SIZES)]]
    assert drawn == [pytest.approx([tokens / 1e6 for tokens in line]) for line in expected]


def test_a_ramp_that_cannot_be_dealt_out_is_refused(shards, tmp_path, capsys):
    with pytest.raises(
        UserError, match="--batch_ramp_from 64: take a multiple of --block_size 16, one or more for each of 8"
    ) as error:
        check_batch(TrainConfig(micro_batch=2, **RAMP), 16, 8)
    assert error.value.status == 2
    check_batch(TrainConfig(micro_batch=2, **RAMP | {"batch_ramp_from": 128}), 16, 8)
    assert run_train(ramp_flags(shards, tmp_path / "log", batch_ramp_from=512)) == 2
    assert "--batch_ramp_from 512 is above --batch_tokens" in capsys.readouterr().err
    assert run_train(ramp_flags(shards, tmp_path / "log")) == 0
    for change, said in (
        ({"batch_ramp_steps": 4}, "_steps is 4, but 5"),
        ({"batch_ramp_from": 32}, "_from is 32, but 64"),
    ):
        capsys.readouterr()
        assert run_train(ramp_flags(shards, tmp_path / "log", **change)) == 2
        assert f"--batch_ramp{said} in the run" in capsys.readouterr().err
