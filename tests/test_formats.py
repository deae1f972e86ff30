"""What people have becomes shards: files of every kind, split, compressed, in folders, and what is left out is said."""

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from conftest import ROOT
from tiktoken_ext.openai_public import r50k_pat_str

import fineweb
from fineweb import Manifest
from support import readers
from support.cli import exit_status
from support.tokens import open_shard, tokenizer

FORMATS = Path(__file__).parent / "formats"  # files that other libraries wrote, see make.py there
ROWS = [row["text"] for row in json.loads((FORMATS / "rows.json").read_text())]
LONG_TEXT = "One line of a text that is rather long.\n" * 300


@pytest.fixture(scope="module")
def tokens_of():
    """The tokens that documents must become, by the pattern that tiktoken ships."""
    ranks = tokenizer()._mergeable_ranks
    encoding = tiktoken.Encoding("r", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: [token for text in texts for token in [50256, *encoding.encode_ordinary(text)]]


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """run(*argv) runs fineweb.py in tmp_path and gives its status and its lines on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv) -> tuple[int, list[str]]:
        argv = ["--workers", "1", "--shard_tokens", "1000", *map(str, argv)]
        status = exit_status(partial(fineweb.main, argv), "fineweb.py")
        return status, capsys.readouterr().err.splitlines()

    return run


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def lines(*texts) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def found(folder: Path, split: str) -> list[int]:
    paths = sorted(folder.glob(f"*_{split}_*"))
    return np.concatenate([open_shard(path) for path in paths]).tolist()


def everything(folder: Path) -> list[int]:
    """All tokens of a folder whose validation shard is its first."""
    return found(folder, "val") + found(folder, "train")


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    "name", sorted(name for name in os.listdir(FORMATS) if re.match(r"(?!.*(rows|long|make))", name))
)
def test_what_other_libraries_write_is_read(tmp_path, run, tokens_of, name):
    (tmp_path / "texts").mkdir()
    shutil.copy(FORMATS / name, tmp_path / "texts")
    status, said = run("--dataset", "texts")
    assert status == 0, said
    # CSV has no null: an empty field stands for it.
    texts = [text for text in ROWS if text is not None and (text or not re.search(r"\.[ct]sv", name))]
    assert everything(tmp_path / "texts_shards") == tokens_of(texts)


def test_formats_has_files_of_every_kind():
    kinds = {readers.find_reader(path.name)[0] for path in FORMATS.iterdir()}
    assert kinds >= set(readers.READERS.values()) - {readers.read_text}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".zstd", ".bz2", ".xz", ".GZ"])
@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "ndjson", "json"])
def test_text_is_read_compressed_too_and_a_cut_file_is_an_error(tmp_path, run, tokens_of, kind, suffix):
    texts = [f"{i}: {LONG_TEXT}" for i in range(30)]
    separator = {"csv": ",", "tsv": "\t"}.get(kind)
    content = {
        "txt": "<|endoftext|>\n".join(texts), "json": json.dumps([{"text": text} for text in texts]),
        "ndjson": lines(*texts),
    }.get(kind)  # fmt: skip
    if separator:
        content = f"n{separator}text\n" + "".join(f'{i}{separator}"{text}"\n' for i, text in enumerate(texts))
    if kind == "txt":
        texts = [text.removesuffix("\n") for text in texts[:-1]] + [texts[-1]]
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}.get(suffix.lower())
    raw = content.encode()
    packed = compress(raw) if compress else pa.compress(raw, codec="zstd", asbytes=True)
    write(tmp_path, {f"texts/a.{kind}{suffix}": packed})
    status, said = run("--dataset", "texts")
    assert status == 0, said
    assert everything(tmp_path / "texts_shards") == tokens_of(texts)
    if suffix or kind in ("csv", "json"):
        for end in (len(packed) // 2, len(packed) - 3):
            write(tmp_path, {f"texts/a.{kind}{suffix}": packed[:end]})
            status, said = run("--dataset", "texts", "--out_dir", "cut")
            assert status == 1
            assert re.match(rf"fineweb.py: cannot read .*a\.{kind}{suffix}", said[-1])


def test_a_zstandard_window_that_is_too_large_says_what_to_do(tmp_path, run):
    (tmp_path / "texts").mkdir()
    shutil.copy(FORMATS / "zstandard-long.jsonl.zst", tmp_path / "texts")
    status, said = run("--dataset", "texts")
    assert status == 1
    assert "zstd -d --long=31" in said[-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,text\n1,one,two\n", r"row 0: it has 3 fields, the first line 2"),
        ("a.csv", "id,words\n1,one\n", r"no field named text, only id, words: name the text's field"),
        ("a.csv", 'id,text\n1,"one\n', r"cannot read .*a\.csv, row 0"),
        ("a.json", '[{"text": "x"},\n {"text": "y"}\n', "row 2: here its array is cut"),
        ("a.json", '[{"text": "x"},\n {"text": "y"]\n', "row 1: here its array is cut, or no JSON"),
        ("a.json", '[[{"text": "x"}]]', "row 0"),
        ("a.json", '{"text":\n"x"}', "row 0"),
        ("a.arrow", "ARROW1 and no more", r"cannot read .*a\.arrow"),
        ("a.arrow", "", r"cannot read .*a\.arrow"),
        ("a.jsonl.xz", "not xz", r"cannot read .*a\.jsonl\.xz"),
        ("a.jsonl.zst", "not zstd", r"cannot read .*a\.jsonl\.zst"),
        ("a.md.gz", "x", r"no \.parquet, \.arrow, .*\.txt \(\.gz, \.zst.*\) files in .*texts"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, run, name, content, message):
    write(tmp_path / "texts", {name: content})
    status, said = run("--dataset", "texts")
    assert status == 1
    assert re.search(message, said[-1]), said
    assert not (tmp_path / "texts_shards").exists()


def test_empty_files_and_arrays_are_no_documents(tmp_path, run, tokens_of):
    write(tmp_path / "texts", {"a.json": "[]", "b.json": " [ \n ]\n", "c.jsonl": "", "d.jsonl": lines("some text")})
    assert run("--dataset", "texts")[0] == 0
    assert everything(tmp_path / "texts_shards") == tokens_of(["some text"])
    write(tmp_path / "csv", {"a.csv": "", "b.csv": "text\nsome text\n", "val.csv": "text\n"})
    assert "csv has too little text for validation" in run("--dataset", "csv")[1][-1]
    (tmp_path / "csv" / "val.csv").unlink()
    assert run("--dataset", "csv")[0] == 0
    assert everything(tmp_path / "csv_shards") == tokens_of(["some text"])


def test_a_long_array_is_read_a_part_at_a_time(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": LONG_TEXT}] * 6000))  # 72 MB
    tracemalloc.start()
    assert sum(1 for _ in readers.read_rows(path)) == 6000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 72_000_000


# ---------------------------------------------------------------- bad bytes


BAD = {
    "a.txt": "good", "b.txt": b"caf\xe9", "c.txt": "u16".encode("utf-16"), "sub/d.txt.gz": gzip.compress(b"\xff"),
    "e.txt": "version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
}  # fmt: skip


def test_all_files_that_are_no_text_are_named_before_any_work(tmp_path, run):
    write(tmp_path / "texts", BAD)
    status, said = run("--dataset", "texts")
    assert status == 1
    for name, why in [("b.txt", "not UTF-8"), ("c.txt", "UTF-16"), ("sub/d.txt.gz", "not UTF-8"), ("e.txt", "git lfs")]:
        assert re.search(rf"texts/{name} \([^)]*{why}", said[-1])
    assert "a.txt" not in said[-1]
    assert "--errors replace" in said[-1]
    write(tmp_path / "tables", {"a.parquet": BAD["e.txt"]})
    assert "a.parquet (it is a pointer of Git LFS, not the data (git lfs pull " in run("--dataset", "tables")[1][-1]
    assert not (tmp_path / "texts_shards").exists()


def test_errors_replace_takes_what_is_not_utf8(tmp_path, run, tokens_of):
    bad = b'{"text": "caf\xe9"}\n'
    write(tmp_path / "texts", {"a.jsonl": lines("good") + "\n", "b.jsonl": bad})
    assert run("--dataset", "texts")[0] == 1
    assert run("--dataset", "texts", "--errors", "replace")[0] == 0
    assert everything(tmp_path / "texts_shards") == tokens_of(["good", "caf\ufffd"])
    assert Manifest.load(tmp_path / "texts_shards").errors == "replace"
    assert "begun with errors replace, not strict" in run("--dataset", "texts")[1][-1]


# ---------------------------------------------------------------- splits


def test_files_named_after_a_split_are_used_as_such(tmp_path, run, tokens_of):
    write(tmp_path / "texts", {
        "train.jsonl": lines("train one", "train two"), "valid.jsonl": lines("VALID"),
        "test.jsonl": lines("TEST one", "TEST two"), "more.jsonl": lines("more"),
    })  # fmt: skip
    status, said = run("--dataset", "texts")
    assert status == 0
    assert found(tmp_path / "texts_shards", "val") == tokens_of(["VALID"])
    assert found(tmp_path / "texts_shards", "train") == tokens_of(["more", "train one", "train two"])
    assert said[0] == "texts: 3 files, 0.00 GB; for validation: valid.jsonl; left out: test.jsonl"
    manifest = fineweb.verify(tmp_path / "texts_shards")
    assert list(manifest.files) == ["valid.jsonl", "more.jsonl", "train.jsonl"]
    assert manifest.val_files == 1
    assert manifest.left_out == ["test.jsonl"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"), ("data/validation-00000-of-00001.parquet", "val"),
        ("TinyStories-train.txt", "train"), ("TinyStoriesV2-GPT4-valid.txt", "val"), ("wiki_val.txt", "val"),
        ("dev.jsonl", "val"), ("DEV/a.jsonl", "val"), ("test01.csv", "test"), ("my.eval.jsonl", "test"),
        ("holdout/a.txt", "test"), ("tests.jsonl", "test"), ("evaluation/a.txt", "test"),
        ("train/test.txt", "test"), ("test/train.txt", "train"), ("train_dev.txt", "val"),
        ("latest.txt", "train"), ("developers.txt", "train"), ("contest.txt", "train"), ("values/a.txt", "train"),
        ("000_00000.parquet", "train"),
    ],
)  # fmt: skip
def test_whole_words_tell_a_split(name, split):
    assert fineweb.split_of(name, Manifest("d", "", "", 100, None)) == split


def test_validation_files_fill_one_shard_and_the_rest_of_them_is_left(tmp_path, run, tokens_of, monkeypatch):
    monkeypatch.setattr(fineweb, "BATCH_CHARACTERS", 100)
    validation = [f"validation {i} {LONG_TEXT[:500]}" for i in range(20)]
    training = [f"training {i} {LONG_TEXT[:500]}" for i in range(20)]
    write(tmp_path / "texts", {"train/a.jsonl": lines(*training)})
    write(tmp_path / "texts", {f"val/{i}.jsonl": lines(*validation[10 * i : 10 * i + 10]) for i in range(2)})
    assert run("--dataset", "texts")[0] == 0
    assert found(tmp_path / "texts_shards", "val") == tokens_of(validation)[:1000]
    assert found(tmp_path / "texts_shards", "train") == tokens_of(training)
    # --max_tokens counts what is trained on; the validation shard stays whole.
    assert run("--dataset", "texts", "--max_tokens", 1500, "--out_dir", "few")[0] == 0
    assert found(tmp_path / "few", "val") == tokens_of(validation)[:1000]
    assert found(tmp_path / "few", "train") == tokens_of(training)[:1500]


def test_splits_that_cannot_be_guessed_are_named(tmp_path, run, tokens_of):
    write(tmp_path / "texts", {
        "fold1.jsonl": lines("one"), "fold2.jsonl": lines("two"), "fold10.jsonl": lines("ten"),
        "test.jsonl": lines("T"),
    })  # fmt: skip
    status, said = run("--dataset", "texts", "--split", "fold1", "--val_split", "FOLD2")
    assert status == 0
    assert found(tmp_path / "texts_shards", "train") == tokens_of(["one"])
    assert found(tmp_path / "texts_shards", "val") == tokens_of(["two"])
    assert "left out: fold10.jsonl, test.jsonl" in said[0]
    assert run("--dataset", "texts", "--split", "test", "--val_split", "fold10", "--out_dir", "t")[0] == 0
    assert found(tmp_path / "t", "train") == tokens_of(["T"])
    assert found(tmp_path / "t", "val") == tokens_of(["ten"])
    for flags, lacking in [(("--split", "fold3"), "train"), (("--val_split", "fold3"), "val")]:
        status, said = run("--dataset", "texts", *flags, "--out_dir", "no")
        assert status == 1
        assert f"is for {lacking} by its name: choose by --split and --val_split (" in said[-1]
        assert "fold10.jsonl" in said[-1]
    assert "begun with split fold1, not None" in run("--dataset", "texts", "--val_split", "FOLD2")[1][-1]
    write(tmp_path / "folders", {f"train/{name}.txt": f"{name} text" for name in ("a", "val", "test")})
    assert run("--dataset", "folders", "--split", "train")[0] == 0
    assert found(tmp_path / "folders_shards", "train") == tokens_of(["a text"])
    assert found(tmp_path / "folders_shards", "val") == tokens_of(["val text"])
    write(tmp_path / "only", {"test.txt": "some text to try"})
    assert "no file in only is for train by its name" in run("--dataset", "only")[1][-1]


# ---------------------------------------------------------------- which files


def test_subfolders_are_searched_as_spark_and_hive_have_them(tmp_path, run, tokens_of):
    part = pa.table({"text": ["from parquet"]})
    for name in ("data.parquet/part-00000-c000.snappy.parquet", "year=2024/b.parquet", "_temporary/c.parquet",
                 ".cache/d.parquet", "._a.parquet", "a.parquet", "linked/e.parquet"):  # fmt: skip
        path = tmp_path / "texts" / name
        path = tmp_path / "elsewhere" / path.name if "linked" in name else path
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(part.set_column(0, "text", [[name]]), path)
    write(tmp_path / "texts", {"data.parquet/_SUCCESS": "", "data.parquet/.part.crc": "x"})
    (tmp_path / "texts" / "loop").symlink_to(tmp_path / "texts")
    (tmp_path / "texts" / "linked").symlink_to(tmp_path / "elsewhere")
    status, said = run("--dataset", "texts")
    assert status == 0
    # A link to a folder is followed, to one that is seen already it is not.
    names = ["a.parquet", "data.parquet/part-00000-c000.snappy.parquet", "linked/e.parquet", "year=2024/b.parquet"]
    assert everything(tmp_path / "texts_shards") == tokens_of(names)
    assert "left out" not in said[0]


def test_one_kind_is_taken_from_a_folder_and_the_rest_is_named(tmp_path, run, tokens_of):
    files = {"a.csv": "text\nfrom csv\n", "a.jsonl": lines("from JSON"), "a.txt": "from text", "README.md": "no"}
    table = pa.table({"text": ["from Arrow"]})
    pq.write_table(table.set_column(0, "text", [["from parquet"]]), tmp_path / "z.parquet")
    with pa.ipc.new_stream(tmp_path / "z.arrow", table.schema) as writer:
        writer.write_table(table)
    files |= {name: (tmp_path / name).read_bytes() for name in ("z.parquet", "z.arrow")}
    write(tmp_path / "texts", files | {"requirements.txt": "numpy", "SHA256SUMS.txt": "0 a.jsonl"})
    left_out = ["README.md", "SHA256SUMS.txt", "a.csv", "a.jsonl", "a.txt", "requirements.txt", "z.arrow"]
    for name, expected in [("z.parquet", "from parquet"), ("z.arrow", "from Arrow"), ("a.jsonl", "from JSON"),
                           ("a.csv", "from csv")]:  # fmt: skip
        status, said = run("--dataset", "texts", "--out_dir", f"with-{name}")
        assert status == 0
        assert everything(tmp_path / f"with-{name}") == tokens_of([expected])
        left_out = [other for other in left_out if other != name]
        shown = ", ".join(left_out[:5]) + (f" and {len(left_out) - 5} more" if len(left_out) > 5 else "")
        assert said[0] == f"texts: 1 files, 0.00 GB; left out: {shown}"
        (tmp_path / "texts" / name).unlink()


def test_the_same_rows_in_two_forms_are_read_once_and_what_is_no_text_is_passed_over(tmp_path, run, tokens_of):
    content = lines("one", "two")
    write(tmp_path / "texts", {
        "a.jsonl": content, "a.jsonl.gz": gzip.compress(content.encode()), "a.json": content, "b.x.json": lines("x"),
        "b.y.jsonl.gz": gzip.compress(lines("y").encode()), "dataset_infos.json": "{}", "package.json": "{}",
    })  # fmt: skip
    assert run("--dataset", "texts")[0] == 0
    assert everything(tmp_path / "texts_shards") == tokens_of(["one", "two", "x", "y"])
    assert Manifest.load(tmp_path / "texts_shards").left_out == ["a.jsonl", "a.jsonl.gz"]


def test_a_single_file_and_the_home_folder_work(tmp_path, run, tokens_of, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path / "home" / "texts", {"test.jsonl.gz": gzip.compress(lines("home").encode()), "a.jsonl": lines("no")})
    assert run("--dataset", "~/texts/test.jsonl.gz")[0] == 0
    assert everything(tmp_path / "test_shards") == tokens_of(["home"])
    assert sorted(p.name for p in (tmp_path / "test_shards").glob("*.npy"))[0] == "test_train_000001.npy"
    assert run("--dataset", "~/texts/test.jsonl.gz")[1][-1].startswith("test_shards: 2 shards")
    assert run("--dataset", "~/texts/test.jsonl.gz", "--split", "train", "--out_dir", "t")[0] == 0


@pytest.mark.parametrize("name", ["./texts", "/no/texts", "~/texts", "texts", "../a/texts"])
def test_a_path_that_is_not_there_is_never_asked_of_the_hub(run, monkeypatch, name):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    status, said = run("--dataset", name)
    assert status == 1
    assert len(said) == 1
    assert said[0].startswith("fineweb.py: there is no folder ")


def test_texts_that_have_changed_are_news(tmp_path, run):
    write(tmp_path / "texts", {"a.txt": "some text", "b.txt": "more text"})
    assert run("--dataset", "texts")[0] == 0
    assert run("--dataset", "texts")[0] == 0
    changes = [
        (lambda: write(tmp_path / "texts", {"c.txt": "new"}), "c.txt"),
        (lambda: (tmp_path / "texts" / "c.txt").unlink() or write(tmp_path / "texts", {"b.txt": "less"}), "b.txt"),
        (lambda: write(tmp_path / "texts", {"b.txt": "same text"}), "by their times"),
    ]
    for change, name in changes:
        change()
        status, said = run("--dataset", "texts")
        assert status == 1
        assert said == [f"fineweb.py: the files in texts are not those of the start ({name}): "
                        "give another --out_dir, or restore them"]  # fmt: skip
    shutil.rmtree(tmp_path / "texts")
    assert run("--dataset", "texts/")[0] == 1  # now it might be anything
    assert run("--dataset", "./texts")[0] == 0  # complete shards outlive their texts


def test_a_manifest_of_before_is_understood(tmp_path, run):
    write(tmp_path / "texts", {"a.jsonl": lines("one", "two"), "test.jsonl": lines("three")})
    assert run("--dataset", "texts", "--split", "a")[0] == 0
    path = tmp_path / "texts_shards" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("errors", "split", "val_split", "val_files", "left_out", "modified"):
        del manifest[name]
    manifest["files"] = {"a.jsonl": 34, "test.jsonl": 18}
    path.write_text(json.dumps(manifest | {"token_ids": [11, 50256]}))
    assert run("--dataset", "texts")[0] == 0
    assert run("--dataset", "texts", "--verify")[0] == 0
    assert run("--dataset", "texts", "--split", "a")[0] == 1


# ---------------------------------------------------------------- long documents


def test_a_long_document_is_encoded_in_parts_to_the_same_tokens(tmp_path, run, tokens_of, monkeypatch):
    monkeypatch.setattr(fineweb, "BATCH_CHARACTERS", 300)
    texts = ["short", LONG_TEXT, "x" * 5000, "<|endoftext|> " * 200 + "\n\n  " * 300, "", "last " * 500]
    write(tmp_path / "texts", {"a.jsonl": lines(*texts)})
    assert run("--dataset", "texts")[0] == 0
    assert everything(tmp_path / "texts_shards") == tokens_of(texts)


def test_a_run_goes_on_within_a_long_document(tmp_path, run, tokens_of, monkeypatch):
    monkeypatch.setattr(fineweb, "BATCH_CHARACTERS", 300)
    write(tmp_path / "texts", {"a.jsonl": lines("short", LONG_TEXT, LONG_TEXT[7:], "last")})
    assert run("--dataset", "texts", "--shard_tokens", 400)[0] == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "texts_shards").iterdir()}
    stopped = 0
    for stop_at in range(1, len(whole) - 2):
        shutil.rmtree(tmp_path / "texts_shards")
        real = fineweb.write_shard

        def stop(tokens, folder, manifest, *args, stop_at=stop_at, real=real):
            if len(manifest.shards) == stop_at:
                raise KeyboardInterrupt
            real(tokens, folder, manifest, *args)

        with monkeypatch.context() as patch:
            patch.setattr(fineweb, "write_shard", stop)
            status, _ = run("--dataset", "texts", "--shard_tokens", 400)
        stopped += status == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # in a notebook, there is more to come
        assert run("--dataset", "texts", "--shard_tokens", 400)[0] == 0
        assert {path.name: path.read_bytes() for path in (tmp_path / "texts_shards").iterdir()} == whole
    assert stopped > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bytes_a_byte"),
    # pyarrow takes 4 for what it decodes, Python's csv 4 for a character.
    [("txt", 3), ("jsonl", 3), ("json", 3), ("parquet", 4.5), ("arrow", 3), ("csv", 5.5)],
)
def test_a_document_of_200_mb_takes_a_few_bytes_a_byte(tmp_path, kind, bytes_a_byte):
    text = "Some words of a long, long document.\n" * 5_400_000
    path = tmp_path / "texts" / f"a.{kind}"
    path.parent.mkdir()
    if kind == "parquet":
        pq.write_table(pa.table({"text": [text]}), path)
    elif kind == "arrow":
        table = pa.table({"text": [text]})
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        content = {"txt": text, "jsonl": lines(text), "json": f"[{lines(text)}]", "csv": f'text\n"{text}"\n'}[kind]
        path.write_text(content)
    program = """
import re, fineweb
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
open("small.txt", "w").write("Some words. " * 2_000_000)
fineweb.main("--dataset small.txt --workers 2 --shard_tokens 1000000".split())
before = peak()
fineweb.main("--dataset texts --workers 2 --shard_tokens 1000000".split())
print(peak() - before)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, stdout=subprocess.PIPE)
    assert 0.5 * len(text) < int(result.stdout) < bytes_a_byte * len(text)
