"""Batches are a function of the step, and shards are what they claim to be."""

import collections
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, TINY, sequences, write_shards

from support.cli import UserError
from support.files import prefetch
from support.order import hashed_order, sequences_at
from support.tokens import open_shard
from support.world import World
from train_gpt2 import GPT, TrainConfig, check_batch, evaluate, step_batches

# 8 sequences a step over 20 in an epoch: steps 3 and 5 hold the ends of two epochs.
CONFIG = TrainConfig(batch_tokens=128, micro_batch=8)
HASHED = [8, 9, 6, 2, 0, 7, 4, 3, 5, 1, 3, 5, 9, 4, 0, 1, 8, 2, 6, 7]  # two epochs of ten sequences


def global_batch(step, data, ranks, micro_batch, config=CONFIG):
    """Inputs and targets of all ranks in order, and the shapes of the micro-batches."""
    config = TrainConfig(batch_tokens=config.batch_tokens, micro_batch=micro_batch, seed=config.seed)
    batches = [part for rank in range(ranks) for part in step_batches(step, data, config, rank, ranks)]
    return torch.cat([x for x, _, _ in batches]), torch.cat([y for _, y, _ in batches]), [len(x) for x, _, _ in batches]


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 8), (1, 1), (2, 2), (2, 4), (4, 1), (8, 1)])
def test_global_batch_does_not_depend_on_ranks_or_micro_batch(shards, ranks, micro_batch):
    data = sequences(shards, "train")
    for step in range(1, 8):
        x, y, _ = global_batch(step, data, 1, 8)
        x2, y2, sizes = global_batch(step, data, ranks, micro_batch)
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
        assert sizes == [micro_batch] * (8 // micro_batch)


def test_an_epoch_holds_every_sequence_once_and_each_has_an_order_of_its_own(shards):
    data = sequences(shards, "train")
    assert len(data) == 8 + 6 + 6
    rows = torch.cat([global_batch(step, data, 1, 8)[0] for step in range(1, 6)])  # two epochs of 20
    everything = collections.Counter(map(tuple, data.read(range(20))[0].tolist()))
    first, second = rows[:20].tolist(), rows[20:].tolist()
    assert collections.Counter(map(tuple, first)) == collections.Counter(map(tuple, second)) == everything
    assert first != second
    assert first != data.read(range(20))[0].tolist()


def test_a_step_may_hold_several_epochs(tmp_path):
    data = sequences(write_shards(tmp_path / "data", [50]), "train")  # 3 sequences for steps of 8
    rows = torch.cat([global_batch(step, data, 1, 8)[0] for step in (1, 2, 3)])
    counts = collections.Counter(map(tuple, rows.tolist()))
    assert sorted(counts.values()) == [8, 8, 8]


def test_the_seed_alone_sets_the_order(shards):
    data = sequences(shards, "train")
    x = global_batch(1, data, 1, 8)[0]
    assert torch.equal(x, global_batch(1, sequences(shards, "train"), 1, 8)[0])
    assert not torch.equal(x, global_batch(1, data, 1, 8, TrainConfig(batch_tokens=128, seed=1))[0])


def test_the_order_is_a_permutation_of_any_number_of_sequences_and_never_changes():
    for n in (*range(1, 70), 255, 256, 257, 1000, 4097, 65_537):
        assert np.array_equal(np.sort(hashed_order(np.arange(n), n, 1337, 0)), np.arange(n))
    assert sequences_at(range(20), 10, 1337) == HASHED


def test_the_order_has_no_visible_structure():
    n = 20_011
    row = hashed_order(np.arange(n), n, 1337, 0)
    for lag in (1, 2, 3, 64, 1000):
        assert abs(np.corrcoef(row[:-lag], row[lag:])[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.corrcoef(row, hashed_order(np.arange(n), n, 1337, 1))[0, 1]) < 4 / np.sqrt(n)
    # Shards against parts of the epoch: chi-square with 19^2 degrees of freedom.
    counts = np.histogram2d(np.arange(n), row, bins=20)[0]
    assert abs(((counts - n / 400) ** 2 / (n / 400)).sum() - 361) < 4 * np.sqrt(2 * 361)
    # Each of the 24 orders of four is as likely as the others.
    orders = collections.Counter(tuple(hashed_order(np.arange(4), 4, seed, 0)) for seed in range(720))
    assert len(orders) == 24
    assert sum((count - 30) ** 2 / 30 for count in orders.values()) < 23 + 4 * np.sqrt(2 * 23)


def test_the_order_of_a_billion_sequences_takes_no_memory():
    tracemalloc.start()
    rows = sequences_at(range(3 * 10**9 - 256, 3 * 10**9 + 256), 10**9, 1337)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 512
    assert max(rows) < 10**9
    assert peak < 2**20


def test_targets_are_the_next_tokens_and_no_sequence_crosses_a_shard_end(shards):
    data = sequences(shards, "train")
    x, y = data.read(range(20))
    assert torch.equal(x[:, 1:], y[:, :-1])
    first, second = (np.load(path) for path in data.paths[:2])
    assert x[7].tolist() == first[112:128].tolist()
    assert y[7].tolist() == first[113:129].tolist()
    assert x[8].tolist() == second[:16].tolist()


def test_bin_shards_of_llm_c_read_like_npy_shards(tmp_path):
    npy = write_shards(tmp_path / "npy", [130, 97])
    binary = write_shards(tmp_path / "bin", [130, 97], suffix="bin")
    for a, b in zip(sequences(npy, "train").read(range(14)), sequences(binary, "train").read(range(14)), strict=True):
        assert torch.equal(a, b)


def bin_shard(path: Path, tokens: np.ndarray, header: bool) -> None:
    """A .bin shard as llm.c writes it; without its header, nanoGPT's."""
    start = np.zeros(256, dtype=np.int32)
    start[:3] = 20240520, 1, len(tokens)
    path.write_bytes((start.tobytes() if header else b"") + tokens.astype(np.uint16).tobytes())


@pytest.mark.parametrize(("prefix", "header"), [("tiny_shakespeare_", True), ("TinyStories_", True), ("", False)])
def test_shards_of_llm_c_without_a_number_and_nanogpts_are_read(tmp_path, prefix, header):
    tokens = {split: np.random.default_rng(i).integers(0, 96, 300) for i, split in enumerate(("train", "val"))}
    for split, values in tokens.items():
        bin_shard(tmp_path / f"{prefix}{split}.bin", values, header)
    for split, values in tokens.items():
        data = sequences(tmp_path, split)
        assert len(data.paths) == 1
        assert data.read(range(18))[0].flatten().tolist() == values[:288].tolist()
    # Elsewhere, what has no header is no shard; nor is an odd number of bytes.
    bin_shard(tmp_path / "other_train_000001.bin", tokens["train"], header=False)
    with pytest.raises(UserError, match=r"other_train_000001\.bin: no header"):
        sequences(tmp_path, "train")
    (tmp_path / "other_train_000001.bin").unlink()
    path = tmp_path / f"{prefix}train.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=re.escape(str(path))):
        sequences(tmp_path, "train")


def test_nanogpts_ids_are_checked_as_all_are(tmp_path):
    bin_shard(tmp_path / "train.bin", np.array([5] * 40 + [50300] * 9), header=False)
    with pytest.raises(UserError, match=r"train\.bin holds token 50300"):
        sequences(tmp_path, "train").read(range(3))


def test_what_is_no_shard_is_passed_over_and_the_same_one_twice_is_refused(tmp_path):
    folder = write_shards(tmp_path / "data", [100, 100])
    for name in ("._tiny_train_000000.npy", "tiny_train_000000.npy.tmp", "notes_train.txt", "tiny_test_000001.bin"):
        (folder / name).write_bytes(b"no shard")
    assert len(sequences(folder, "train").paths) == 2
    bin_shard(folder / "tiny_train_000001.bin", np.zeros(100), header=True)
    with pytest.raises(UserError, match=r"tiny_train_000001\.bin is there as \.npy, too: remove one of them"):
        sequences(folder, "train")


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_a_shard_of_another_type_says_how_to_convert_it(tmp_path, dtype):
    path = tmp_path / "mine_train_000001.npy"
    np.save(path, np.arange(90, dtype=dtype).reshape(3, 30))
    with pytest.raises(UserError, match=rf"it is 2-D {np.dtype(dtype)}, not 1-D uint16.*: np\.save\(") as error:
        open_shard(path)
    exec(re.search(r"np\.save\(.*\)", str(error.value))[0], {"np": np})
    assert open_shard(path).tolist() == list(range(90))


def test_without_shards_the_way_out_is_named(tmp_path):
    write_shards(tmp_path / "data", [100])
    with pytest.raises(UserError, match="no val shards in .*data: call a shard NAME_val_.*--eval_every 0"):
        sequences(tmp_path / "data", "val")
    with pytest.raises(UserError, match="no train shards in .*/no: run `python fineweb.py` first, or try --demo"):
        sequences(tmp_path / "no", "train")
    (tmp_path / "data" / "tiny_train_000000.npy").rename(tmp_path / "data" / "shard0.npy")
    with pytest.raises(UserError, match="no train shards in .*; shards of your own are called NAME_train_000001.npy"):
        sequences(tmp_path / "data", "train")


def damaged(tmp_path, kind):
    """A shard with one fault."""
    folder = write_shards(tmp_path / "data", [100], suffix="bin" if kind.startswith("bin") else "npy")
    path = next(folder.iterdir())
    content = path.read_bytes()
    if kind.endswith("truncated"):
        path.write_bytes(content[:-10])
    elif kind.endswith("empty"):
        path.write_bytes(b"")
    elif kind == "bin longer than its header says":
        path.write_bytes(content + b"\0\0")
    elif kind == "bin of another version":
        path.write_bytes(content[:4] + b"\7" + content[5:])
    elif kind == "a page of HTML":
        path.write_bytes(b"<html>not found</html>")
    elif kind == "pickle":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif kind == "int32":
        np.save(path, np.zeros(100, dtype=np.int32))
    elif kind == "archive":
        np.savez(path.with_suffix(""), np.zeros(100, dtype=np.uint16))
        path.with_suffix(".npz").replace(path)
    elif kind == "2-D":
        np.save(path, np.zeros((10, 10), dtype=np.uint16))
    return path


@pytest.mark.parametrize(
    "kind",
    ["truncated", "empty", "bin truncated", "bin empty", "bin longer than its header says", "bin of another version",
     "a page of HTML", "pickle", "archive", "int32", "2-D"],
)  # fmt: skip
def test_a_damaged_shard_is_named_in_one_line(tmp_path, kind):
    path = damaged(tmp_path, kind)
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        open_shard(path)
    assert "\n" not in str(error.value)


def test_an_id_beyond_the_vocabulary_names_the_shard(tmp_path):
    folder = write_shards(tmp_path / "data", [100, 100])
    path = folder / "tiny_train_000001.npy"
    tokens = np.load(path)
    tokens[50] = 96
    np.save(path, tokens)
    data = sequences(folder, "train")
    data.read(range(6))
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} holds token 96"):
        data.read(range(12))


@pytest.mark.parametrize(("ranks", "micro_batch"), [(3, 8), (3, 2), (3, 1), (5, 1), (7, 4), (1, 3), (2, 3)])
def test_ranks_and_micro_batches_that_do_not_divide_the_batch_share_it_by_weights(shards, ranks, micro_batch):
    data = sequences(shards, "train")
    config = TrainConfig(batch_tokens=128, micro_batch=micro_batch)
    x, y, _ = step_batches(2, data, TrainConfig(batch_tokens=128, micro_batch=8), 0, 1)[0]
    shares = [step_batches(2, data, config, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1  # all come to the same collectives
    parts = [part for share in shares for part in share]
    assert torch.equal(torch.cat([part[0] for part in parts if part[2]]), x)
    assert torch.equal(torch.cat([part[1] for part in parts if part[2]]), y)
    assert all(1 <= len(part[0]) <= micro_batch for part in parts)
    assert [weight for _, _, weight in parts if weight] == [len(p[0]) * ranks / 8 for p in parts if p[2]]
    assert sum(weight for _, _, weight in parts) == pytest.approx(ranks)


def test_a_batch_that_is_no_whole_sequences_or_too_few_for_the_ranks_is_refused_with_its_numbers():
    check_batch(TrainConfig(micro_batch=48), 1024, 7)
    with pytest.raises(UserError, match="--batch_tokens 524288: take a multiple of --block_size 1000") as error:
        check_batch(TrainConfig(), 1000, 8)
    assert error.value.status == 2
    with pytest.raises(UserError, match="--batch_tokens 2048: .*, one or more for each of 3 ranks"):
        check_batch(TrainConfig(batch_tokens=2048), 1024, 3)


@pytest.mark.parametrize("val_tokens", [16, 100, 160, 10**9])
def test_validation_does_not_depend_on_ranks_or_micro_batch(shards, val_tokens, monkeypatch):
    model, data = GPT(TINY), sequences(shards, "val")
    expected, tokens = evaluate(model, data, TrainConfig(val_tokens=val_tokens, micro_batch=1), CPU)
    n = min(12, val_tokens // 16)
    assert tokens == 16 * n
    x, y = data.read(range(n))
    assert expected == pytest.approx(model(x, y).item(), abs=1e-5)
    for ranks, micro_batch in [(1, 5), (2, 3), (3, 64), (16, 1)]:
        parts = []
        monkeypatch.setattr(
            World, "sum", lambda self, *values, parts=parts: parts.append(values) or [*values[:-1], values[-1] or 1]
        )
        for rank in range(ranks):
            world = World(rank, ranks, CPU.device, CPU.dtype)
            evaluate(model, data, TrainConfig(val_tokens=val_tokens, micro_batch=micro_batch), world)
        total, count = map(sum, zip(*parts, strict=True))
        assert count == n
        assert total / count == pytest.approx(expected, abs=1e-5)


def test_prefetch_keeps_the_order_and_hands_on_errors():
    assert list(prefetch(lambda n: n * n, range(20))) == [n * n for n in range(20)]
    assert list(prefetch(str, [])) == []
    results = prefetch(lambda n: 1 // (2 - n), range(5))
    assert next(results) == 0
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
