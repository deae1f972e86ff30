"""Files from anywhere: none runs code, none leads out of its folder, and what is damaged ends in a line."""

import io
import json
import os
import pickle
import random
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import assert_one_line, in_a_child, newest, run_forked, run_train, sequences, tiny_flags, write_shards
from transformers import GPT2Config, GPT2LMHeadModel

import fineweb
import hellaswag
import train_gpt2
from support import checkpoint
from support.cli import UserError
from support.log import read_log

ROWS = [
    {"ctx": "A man is", "ctx_a": "A man is", "ctx_b": "", "activity_label": "Running", "label": str(i % 4),
     "endings": [f"running {i}.", "sitting down.", "on a roof.", "there [title] again."]}
    for i in range(6)
]  # fmt: skip


class Evil:
    """What makes a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# ---------------------------------------------------------------- code in files


@pytest.fixture
def marker(tmp_path) -> Path:
    """A path that is there if a pickle was run; and a look at that it would be."""
    probe = tmp_path / "probe"
    pickle.loads(pickle.dumps(Evil(probe)))
    assert probe.exists()
    yield tmp_path / "evil"
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "place",
    ["model", *(pytest.param(place, marks=pytest.mark.slow) for place in ("optimizer", "TrainConfig", "step")),
     "the file", pytest.param("no archive", marks=pytest.mark.slow)],
)  # fmt: skip
@pytest.mark.parametrize("door", ["resume", "sample", "export", "init_from", "hellaswag"])
def test_a_checkpoint_runs_no_code(shards, tmp_path, marker, place, door):
    out = tmp_path / "log"
    assert run_train(tiny_flags(shards, out, max_steps=3, save_every=3)) == 0
    path = checkpoint.find(out)[-1]
    content = newest(out)
    if place == "no archive":
        path.write_bytes(pickle.dumps(Evil(marker)))
    else:
        torch.save(Evil(marker) if place == "the file" else content | {place: Evil(marker)}, path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    result = run_forked({
        "resume": ["train_gpt2", *tiny_flags(shards, out, max_steps=3)],
        "sample": ["train_gpt2", "--sample", "--out_dir", out],
        "export": ["train_gpt2", "--out_dir", out, "--export", tmp_path / "exported"],
        "init_from": ["train_gpt2", *tiny_flags(shards, tmp_path / "new", init_from=path)],
        "hellaswag": ["hellaswag", "--model", path, "--data", tmp_path / "rows.jsonl"],
    }[door], tmp_path)  # fmt: skip
    assert result.returncode == 1
    assert_one_line(result)
    assert f"cannot read checkpoint {path}" in result.stderr
    assert "weights_only" not in result.stderr


@pytest.mark.parametrize("kind", ["object array", "pickle", "archive of objects"])
def test_a_shard_runs_no_code(shards, tmp_path, marker, kind):
    path = shards / "tiny_train_000002.npy"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(marker)))
    elif kind == "object array":
        np.save(path, np.array([Evil(marker)], dtype=object), allow_pickle=True)
    else:
        with path.open("wb") as file:
            np.savez(file, np.array([Evil(marker)], dtype=object))
    for argv in (["train_gpt2", *tiny_flags(shards, tmp_path / "log")], ["fineweb", "--dataset", shards, "--verify"]):
        result = run_forked(argv, tmp_path)
        assert result.returncode == 1
        assert_one_line(result)


def test_a_manifest_runs_no_code(shards, tmp_path, marker):
    (shards / "manifest.json").write_bytes(pickle.dumps(Evil(marker)))
    result = run_forked(["train_gpt2", *tiny_flags(shards, tmp_path / "log", mask_unseen=True)], tmp_path)
    assert_one_line(result)
    assert result.returncode == 1


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.gz", "txt"])
def test_a_dataset_runs_no_code(tmp_path, marker, suffix):
    (tmp_path / "texts").mkdir()
    path = tmp_path / "texts" / f"a.{suffix}"
    path.write_bytes(pickle.dumps(Evil(marker)))
    result = run_forked(["fineweb", "--dataset", path.parent, "--out_dir", tmp_path / "out", "--workers", 1], tmp_path)
    assert result.returncode == 1
    assert_one_line(result)
    if suffix in ("parquet", "jsonl"):
        result = run_forked(["hellaswag", "--model", tmp_path, "--data", path], tmp_path)
        assert result.returncode == 1
        assert_one_line(result)


def test_a_parquet_column_that_names_a_python_type_runs_no_code(tmp_path, marker):
    pickled = pickle.dumps(Evil(marker))
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled}
    schema = pa.schema([pa.field("text", pa.string(), metadata=metadata)])
    (tmp_path / "texts").mkdir()
    pq.write_table(pa.table({"text": ["one two three"]}, schema=schema), tmp_path / "texts" / "a.parquet")
    result = run_forked(["fineweb", "--dataset", tmp_path / "texts", "--out_dir", tmp_path / "out"], tmp_path)
    assert_one_line(result)


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "no safetensors", "code beside the weights"])
def test_weights_of_transformers_run_no_code(tmp_path, marker, kind):
    folder = tmp_path / "hf"
    GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2, vocab_size=96)).save_pretrained(folder)
    if kind == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save({"transformer.wte.weight": Evil(marker)}, folder / "pytorch_model.bin")
    elif kind == "no safetensors":
        torch.save(GPT2LMHeadModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        config["_attn_implementation"] = "owner/name"  # a kernel to download
        config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nModel = Config = None\n")
    result = run_forked(["train_gpt2", "--sample", "--init_from", folder, "--prompt", "!", "--max_length", 4], tmp_path)
    assert_one_line(result)
    assert (result.returncode == 0) == (kind == "code beside the weights")


# ---------------------------------------------------------------- damage of any kind


def mutate(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, taken away, put in, doubled, or zeroed."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, n = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 16, 300))
        kind = rng.randrange(6)
        if kind == 0:
            data[at : at + n] = rng.randbytes(len(data[at : at + n]))
        elif kind == 1:
            del data[at : at + n]
        elif kind == 2:
            data[at:at] = rng.randbytes(n)
        elif kind == 3:
            data[at:at] = data[at : at + n]
        elif kind == 4:
            data[at : at + n] = bytes(len(data[at : at + n]))
        elif at < len(data):
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)


def rezip(content: bytes, rng: random.Random) -> bytes:
    """A zip archive with one file in it mutated, and its checksums right: damage that only its reader can see."""
    source, target = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    chosen = rng.choice([name for name in source.namelist() if name.endswith((".pkl", "version", "byteorder"))])
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in source.namelist():
            archive.writestr(name, mutate(source.read(name), rng) if name == chosen else source.read(name))
    return target.getvalue()


def read_shard(path: Path) -> None:
    data = sequences(path.parent, "train")
    data.read(range(len(data)))


RUN = {"max_steps": 3, "save_every": 3, "n_layer": 1, "eval_every": 0}


def read_checkpoint(path: Path) -> None:
    checkpoint.newest(str(path.parent))


def read_run_log(path: Path) -> None:
    read_log(path)


def read_dataset(path: Path) -> None:
    manifest = fineweb.Manifest(str(path.parent), "", "main", 10_000, None, files={path.name: path.stat().st_size})
    for _ in fineweb.read_batches([path], manifest):
        pass


def read_hellaswag(path: Path) -> None:
    for style in ("completion", "harness"):
        examples = hellaswag.read_examples(str(path), style)
        hellaswag.HellaSwag(examples, style, train_gpt2.GPTConfig(block_size=32))


def seeds(tmp_path: Path) -> dict[str, tuple[Path, object]]:
    """A real file of each kind, and its reader."""
    npy = write_shards(tmp_path / "npy", [60])
    binary = write_shards(tmp_path / "bin", [60], suffix="bin")
    data = write_shards(write_shards(tmp_path / "data", [200], split="val"), [130])
    out = tmp_path / "log"
    run_train(tiny_flags(data, out, **RUN))
    for kind in ("jsonl", "parquet"):
        (tmp_path / kind).mkdir()
        (tmp_path / f"rows_{kind}").mkdir()
    rows = tmp_path / "rows_jsonl" / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows_parquet" / "rows.parquet")
    texts = [{"text": f"text {i} " * 30, "id": i} for i in range(20)]
    (tmp_path / "jsonl" / "a.jsonl").write_text("\n".join(map(json.dumps, texts)))
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "parquet" / "a.parquet")
    return {
        "npy shard": (next(npy.iterdir()), read_shard),
        "bin shard": (next(binary.iterdir()), read_shard),
        "checkpoint": (checkpoint.find(out)[-1], read_checkpoint),
        "log": (out / "log.jsonl", read_run_log),
        "JSON lines": (tmp_path / "jsonl" / "a.jsonl", read_dataset),
        "parquet": (tmp_path / "parquet" / "a.parquet", read_dataset),
        "HellaSwag JSON lines": (rows, read_hellaswag),
        "HellaSwag parquet": (tmp_path / "rows_parquet" / "rows.parquet", read_hellaswag),
    }


KINDS = ["npy shard", "bin shard", "checkpoint", "log", "JSON lines", "parquet",
         "HellaSwag JSON lines", "HellaSwag parquet"]  # fmt: skip


def read_mutations(path: Path, read, seed: int, count: int) -> None:
    """Read a file that is mutated anew each time; anything but success and UserError is an error."""
    rng, content, refused = random.Random(seed), path.read_bytes(), []
    read(path)
    for number in range(count):
        zipped = path.suffix == ".pt" and number % 2
        path.write_bytes(damaged := (rezip if zipped else mutate)(content, rng))
        try:
            read(path)
        except UserError as error:
            refused.append(str(error))
        except BaseException:
            traceback.print_exc()
            raise SystemExit(f"mutation {number} of seed {seed}: {damaged[:2000]!r}") from None
    path.write_bytes(content)
    assert refused or path.name == "log.jsonl", "no mutation was noticed"
    assert all("\n" not in line and len(line) > 10 for line in refused)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_read_or_refused_in_a_line(tmp_path, kind):
    path, read = seeds(tmp_path)[kind]
    in_a_child(read_mutations, path, read, KINDS.index(kind), 300, timeout=240)


@pytest.mark.slow
def test_a_run_resumes_beside_a_mutated_log(shards, tmp_path):
    out = tmp_path / "log"
    flags = ["train_gpt2", *tiny_flags(shards, out, save_every=2)]
    assert run_forked(flags, tmp_path).returncode == 0
    content, rng = (out / "log.jsonl").read_bytes(), random.Random(0)
    for _ in range(20):
        (out / "log.jsonl").write_bytes(mutate(content, rng))
        result = run_forked(flags, tmp_path)
        assert_one_line(result)
        assert result.returncode == 0 or "train tokens, but had" in result.stderr


def test_nothing_is_written_through_a_link(shards, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("keep me")
    (tmp_path / "log").mkdir()
    for name in ("log/ckpt_000002.pt", "log/curves.png"):
        (tmp_path / f"{name}.tmp").symlink_to(victim)
    assert run_train(tiny_flags(shards, tmp_path / "log", mask_unseen=True)) == 0
    os.link(victim, shards / "manifest.json.tmp")
    fineweb.Manifest("a/b", "", "main", 100, None).save(shards)
    assert victim.read_text() == "keep me"
