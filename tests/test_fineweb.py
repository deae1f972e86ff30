"""From text to shards: tokens, shards, the manifest, a restart at any point."""

import errno
import fcntl
import gzip
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import termios
import time
import tracemalloc
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from conftest import ROOT, run_script, run_train, small_files, start_script, wait_for
from tiktoken_ext.openai_public import r50k_pat_str

import fineweb
from fineweb import Batch, Manifest, Place, build, find_token_ids, verify
from support.cli import UserError, exit_status
from support.files import whole_file
from support.readers import read_rows
from support.tokens import CUT, END_OF_TEXT, RANKS_FILE, encode_document, open_shard, tokenizer


def fuzz(seed: int, length: int) -> str:
    """Text with characters of every Unicode plane, among words, numbers, white space and what looks special."""
    rng = random.Random(seed)
    pieces = [*"  \n\n\t'.,:", "word", " the", "'ll", "12", "<|endoftext|>", "\r\n", "\u00a0", "\u2003", "é"]
    text = ""
    while len(text) < length:
        code = rng.randrange(17) * 0x10000 + rng.randrange(0x10000)
        text += rng.choice(pieces) if rng.random() < 0.8 or 0xD800 <= code < 0xE000 else chr(code)
    return text[:length]


@pytest.fixture(scope="module")
def reference() -> tiktoken.Encoding:
    """GPT-2's encoding with the pattern that tiktoken ships."""
    ranks = tokenizer()._mergeable_ranks
    return tiktoken.Encoding("r", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


def stream(reference, texts) -> np.ndarray:
    """What the shards of these documents must hold, one after the other."""
    tokens = [token for text in texts if text is not None for token in [50256, *reference.encode_ordinary(text)]]
    return np.array(tokens, dtype=np.uint16)


def write_parquet(path: Path, texts: list, rows: int = 7) -> Path:
    """A parquet file with a column more than needed, in groups of so many rows; returns its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = [str(i) for i in range(len(texts))]
    pq.write_table(pa.table({"id": ids, "text": pa.array(texts, pa.string())}), path, row_group_size=rows)
    return path.parent


def wanted(dataset, shard_tokens=100, max_tokens=None) -> Manifest:
    return Manifest(str(dataset), "", "main", shard_tokens, max_tokens)


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def shards(folder) -> list[np.ndarray]:
    """The shards of a folder in the order of their numbers."""
    return [open_shard(path) for path in sorted(Path(folder).glob("*_[0-9]*"), key=lambda p: p.name[-10:])]


def long_texts(number: int) -> list[str]:
    """Different texts of 100,000 characters, which are quickly made."""
    return [fuzz(i, 1000) * 100 for i in range(number)]


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


DOCUMENTS = [
    "one two three",
    "",
    None,
    fuzz(1, 300),
    "a<|endoftext|>b",
    "long " * 330,
    *(fuzz(i, 40 + i) for i in range(40)),
]


# ---------------------------------------------------------------- tokens


def test_the_tokenizer_is_gpt2s():
    # Ids as in OpenAI's encoder.json.
    assert tokenizer().encode_ordinary("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert tokenizer().n_vocab == 50257
    assert tokenizer().eot_token == END_OF_TEXT == 50256
    text = "naïve \U0001f600 世界\r\n\t  don't 12345 <|endoftext|>"
    assert tokenizer().decode(tokenizer().encode_ordinary(text)) == text


def test_the_faster_pattern_gives_the_tokens_of_tiktokens_own(reference):
    for seed in range(2000):
        text = fuzz(seed, 1 + seed % 97)
        assert tokenizer().encode_ordinary(text) == reference.encode_ordinary(text)
    for text in topics.values():
        assert tokenizer().encode_ordinary(text) == reference.encode_ordinary(text)


def test_a_document_opens_with_end_of_text_and_holds_no_other(reference):
    tokens = encode_document("a<|endoftext|>b")
    assert tokens.dtype == np.uint16
    assert tokens[0] == END_OF_TEXT
    assert END_OF_TEXT not in tokens[1:]
    assert encode_document("").tolist() == [END_OF_TEXT]
    for seed in range(300):
        text = fuzz(seed, 60)
        assert encode_document(text).tolist() == stream(reference, [text]).tolist()


def test_a_batch_is_encoded_as_its_documents_are(reference):
    plain = [fuzz(i, 60).replace("<|endoftext|>", "") for i in range(300)]
    odd = ["a ", " b", "\n", "", "<|endof", "text|>", " "]
    for texts in (plain, odd, [*plain, "<|endoftext|>"], ["x\ud800y", "z"]):
        batch = Batch(Place(0, 0), 1.0, texts)
        encoded = fineweb.encode_batch(batch)
        expected = stream(reference, [text.replace("\ud800", "\ufffd") for text in texts])
        assert encoded[:2] == batch[:2]
        assert encoded.content.dtype == np.uint16
        assert encoded.content.tolist() == expected.tolist()


def test_text_that_stops_the_regular_expression_is_encoded_all_the_same(reference):
    run = 1_200_000
    for text in ["a" + " " * run + "b", "\n" * run + "b  c\u00a0\u00a0d", " " * run]:
        tokens = encode_document(text)[1:].tolist()
        if text.strip():
            with pytest.raises(ValueError, match="[Rr]egex"):
                reference.encode_to_numpy(text, disallowed_special=())
            # A run of white space is one piece but for its last character, which opens the next.
            before, space, after = text.partition(text[1] * (run - 1))
            assert tokens == [token for piece in (before, space, after) for token in reference.encode_ordinary(piece)]
        assert tokenizer().decode(tokens) == text
    assert encode_document("x\ud800y").tolist() == stream(reference, ["x\ufffdy"]).tolist()  # half a surrogate pair


def test_the_cut_in_white_space_is_where_no_token_crosses(reference):
    for seed in range(1000):
        text = fuzz(seed, 80)
        pieces = CUT.split(text)
        assert [t for piece in pieces for t in reference.encode_ordinary(piece)] == reference.encode_ordinary(text)


def test_altered_ranks_are_refused(tmp_path, monkeypatch):
    altered = tmp_path / "gpt2.tiktoken"
    altered.write_bytes(RANKS_FILE.read_bytes()[:-1] + b"7")
    for path in [altered, tmp_path / "missing"]:
        monkeypatch.setattr("support.tokens.RANKS_FILE", path)
        tokenizer.cache_clear()
        with pytest.raises(UserError, match=f"{path.name}.* SHA-256"):
            tokenizer()


def test_missing_ranks_are_one_line_with_workers_too(tmp_path):
    script = tmp_path / "fineweb.py"
    script.write_bytes(Path(fineweb.__file__).read_bytes())
    shutil.copytree(ROOT / "support", tmp_path / "support")  # without assets/ beside it
    source = write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS)
    result = run_script([script, "--dataset", source, "--workers", 2, "--out_dir", tmp_path / "out"])
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert re.match(r"fineweb.py: .*gpt2.tiktoken is missing, or its SHA-256", result.stderr.splitlines()[-1])


# ---------------------------------------------------------------- shards


def test_shards_hold_the_documents_one_after_the_other(tmp_path, reference):
    source = write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS)
    manifest = build(tmp_path / "out", wanted(source))
    expected, parts = stream(reference, DOCUMENTS), shards(tmp_path / "out")
    assert len(encode_document(DOCUMENTS[5])) > 300  # longer than three shards
    assert all(part.dtype == np.uint16 and part.ndim == 1 for part in parts)
    assert [len(part) for part in parts[:-1]] == [100] * (len(parts) - 1)
    assert np.array_equal(np.concatenate(parts), expected)
    names = [f"text_{'train' if i else 'val'}_{i:06d}.npy" for i in range(len(parts))]
    assert sorted(contents(tmp_path / "out")) == sorted([*names, "manifest.json"])
    assert [shard["name"] for shard in manifest.shards] == names
    assert manifest.complete
    assert manifest.tokens == len(expected)
    assert manifest.documents == sum(text is not None for text in DOCUMENTS)
    assert find_token_ids(tmp_path / "out", 50257) == sorted(set(expected.tolist()))


def test_a_shard_is_the_file_that_numpy_would_save(tmp_path):
    build(tmp_path / "out", wanted(write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS)))
    shard = tmp_path / "out" / "text_val_000000.npy"
    np.save(tmp_path / "again.npy", np.load(shard))
    assert shard.read_bytes() == (tmp_path / "again.npy").read_bytes()


def test_every_kind_of_file_gives_the_same_shards(tmp_path, reference):
    texts = [text for text in DOCUMENTS if text is not None]
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in [*DOCUMENTS[:7], *texts[6:]])
    write_parquet(tmp_path / "parquet" / "b.parquet", DOCUMENTS[7:])
    write_parquet(tmp_path / "parquet" / "a.parquet", DOCUMENTS[:7])
    for kind, content in {"jsonl": (lines + "\n").encode(), "jsonl.gz": gzip.compress(lines.encode())}.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"text.{kind}").write_bytes(content)
        (tmp_path / kind / "README.md").write_text("not a text to take")
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "txt" / f"{i:03d}.txt").write_bytes(text.encode())
    for kind in ["parquet", "jsonl", "jsonl.gz", "txt"]:
        out = tmp_path / f"out-{kind}"
        manifest = build(out, wanted(tmp_path / kind))
        # Of text files alone the line ends are normalised, and an empty one is no document.
        expected = [text.replace("\r\n", "\n") for text in texts if text] if kind == "txt" else texts
        assert np.array_equal(np.concatenate(shards(out)), stream(reference, expected))
        assert manifest.documents == len(expected)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_that_is_just_endoftext_separates_the_documents_of_a_text_file(tmp_path, reference, end):
    stories = [f"Story {i}.\n\nIt ends <|endoftext|> here.\n <|endoftext|>" for i in range(20)]
    lines = ["\ufeff", *(f"{story}\n<|endoftext|>\n" for story in stories), "  \n<|endoftext|>\n", "The last.\n"]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "stories.txt").write_bytes("".join(lines).replace("\n", end).encode())
    manifest = build(tmp_path / "out", wanted(tmp_path / "text"))
    assert manifest.documents == 21
    assert np.array_equal(np.concatenate(shards(tmp_path / "out")), stream(reference, [*stories, "The last.\n"]))


def test_a_text_file_is_read_a_document_at_a_time(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text(("A story of some length.\n" * 40 + "<|endoftext|>\n") * 2000)  # 2 MB
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**19


def test_other_texts_go_into_a_folder_of_their_own_not_fineweb_edus(tmp_path, monkeypatch):
    write_parquet(tmp_path / "mine" / "a.parquet", DOCUMENTS)
    monkeypatch.chdir(tmp_path)
    assert exit_status(partial(fineweb.main, ["--dataset", "mine/", "--workers", "1"]), "fineweb.py") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine_shards"]
    assert exit_status(partial(fineweb.main, ["--dataset", "mine/", "--verify"]), "fineweb.py") == 0


def test_the_column_of_the_text_can_be_named_and_is_part_of_the_settings(tmp_path, reference, capsys):
    pq.write_table(pa.table({"id": [1, 2], "story": ["one " * 50, "two " * 50]}), make(tmp_path / "a") / "a.parquet")
    (make(tmp_path / "b") / "b.jsonl").write_text("".join(f'{{"story": "{w * 50}"}}\n' for w in ("one ", "two ")))
    for kind in "ab":
        out, argv = tmp_path / f"out-{kind}", ["--dataset", str(tmp_path / kind), "--workers", "1"]
        assert exit_status(partial(fineweb.main, [*argv, "--out_dir", str(out)]), "fineweb.py") == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert "row 0: no field named text, only " in line
        assert line.endswith("story: name the text's field with --text_column, or move the file away")
        argv += ["--out_dir", str(out), "--text_column"]
        assert exit_status(partial(fineweb.main, [*argv, "story"]), "fineweb.py") == 0
        assert np.array_equal(np.concatenate(shards(out)), stream(reference, ["one " * 50, "two " * 50]))
        capsys.readouterr()
        assert exit_status(partial(fineweb.main, [*argv, "id"]), "fineweb.py") == 1
        assert "begun with text_column story, not id" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [2, 57, 100, 101, 199, 200, 201, 1000])
def test_max_tokens_ends_with_a_complete_folder_of_just_so_many(tmp_path, reference, tokens):
    source = write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS)
    manifest = build(tmp_path / "out", wanted(source, max_tokens=tokens))
    parts = shards(tmp_path / "out")
    assert np.array_equal(np.concatenate(parts), stream(reference, DOCUMENTS)[:tokens])
    assert len(parts) > 1  # something to validate on, and something to train on
    assert manifest.complete
    assert verify(tmp_path / "out").shards == manifest.shards


def test_a_small_text_is_cut_in_two_a_tenth_for_validation(tmp_path):
    source = write_parquet(tmp_path / "text" / "a.parquet", ["a"] * 50)  # 100 tokens, just a shard
    build(tmp_path / "out", wanted(source))
    assert [len(part) for part in shards(tmp_path / "out")] == [10, 90]


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "BATCH_CHARACTERS", 5000)  # many batches
    source = write_parquet(tmp_path / "text" / "a.parquet", [fuzz(i, 3000) for i in range(100)])
    for workers in (1, 2, 5):
        build(tmp_path / f"{workers}", wanted(source, 20_000), workers)
        assert contents(tmp_path / f"{workers}") == contents(tmp_path / "1")
    assert len(contents(tmp_path / "1")) > 5


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as file:
        file.write(b"first")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"second")
        file.write(bytes(1 // 0))
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---------------------------------------------------------------- restart


def killed_at(event: int, folder: Path, work) -> bool:
    """Do work(), or build with these settings, in a process that ends with SIGKILL when it opens, renames or removes a
    file in the folder once more than `event` times; returns whether it was killed."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # so that a deadlock is a failure
        seen = 0

        def count(name, arguments):
            nonlocal seen
            if name in ("open", "os.rename", "os.remove") and str(folder) in str(arguments[0]):
                seen += 1
                if seen > event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            build(folder, work) if isinstance(work, Manifest) else work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize(
    ("shard_tokens", "again"),
    [
        (700, ()),
        (5000, ()),  # one shard, that is cut in two
        pytest.param(150, (10, 15), marks=pytest.mark.slow),
        pytest.param(5000, (10, 15), marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_file_operation_a_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, shard_tokens, again):
    source = write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS[:12])
    write_parquet(tmp_path / "text" / "b.parquet", DOCUMENTS[12:20])
    monkeypatch.setattr(fineweb, "BATCH_CHARACTERS", 10)  # many batches in a file
    build(tmp_path / "unbroken", wanted(source, shard_tokens))
    unbroken, event = contents(tmp_path / "unbroken"), 0
    while killed_at(event, out := tmp_path / f"{event}", wanted(source, shard_tokens)):
        if (out / "manifest.json").exists():
            kept, there = Manifest.load(out), set(out.glob("*.npy"))
            assert len(there) - len(kept.shards) in (0, 1)
        for more in again:
            killed_at(more, out, wanted(source, shard_tokens))
        build(out, wanted(source, shard_tokens))
        assert contents(out) == unbroken
        verify(out)
        event += 1
    assert event > len(unbroken) * 4


@pytest.mark.parametrize("event", [20, 60, 100])
def test_a_run_goes_on_from_the_batch_in_which_its_last_shard_ended(tmp_path, monkeypatch, reference, event):
    monkeypatch.setattr(fineweb, "BATCH_CHARACTERS", 10)
    source = write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS)
    assert killed_at(event, tmp_path / "out", wanted(source))
    manifest = Manifest.load(tmp_path / "out")
    _, row, skip = manifest.resume_at
    assert manifest.shards
    assert manifest.tokens - skip == len(stream(reference, DOCUMENTS[:row]))
    assert skip < len(stream(reference, DOCUMENTS[row : row + 10]))


@pytest.mark.parametrize(("kills", "texts"), [(1, 20), pytest.param(6, 60, marks=pytest.mark.slow)])
def test_what_is_killed_from_outside_goes_on_to_the_same_bytes(tmp_path, kills, texts):
    source = write_parquet(tmp_path / "text" / "a.parquet", long_texts(texts))
    build(tmp_path / "unbroken", wanted(source, 30_000), workers=2)
    argv = ["fineweb.py", "--dataset", source, "--workers", 2, "--shard_tokens", 30_000, "--out_dir"]
    rng, killed = random.Random(1), 0
    for attempt in range(20):  # of which some may end before they are killed
        out = tmp_path / f"{attempt - killed}"
        before = len(list(out.glob("*.npy")))
        run = start_script([*argv, out])
        wait_for(lambda: run.poll() is not None or len(list(out.glob("*.npy"))) >= before + 2, run)  # noqa: B023
        time.sleep(rng.random() * 0.1)
        run.kill()
        run.communicate(timeout=60)
        killed += run.returncode == -signal.SIGKILL
        if killed == kills:
            break
    assert killed == kills
    build(out, wanted(source, 30_000))
    assert contents(out) == contents(tmp_path / "unbroken")


def at_work(tmp_path, **kwargs) -> subprocess.Popen:
    """A run with two workers that has written a shard, and has work for minutes."""
    (tmp_path / "text").mkdir()
    line = json.dumps({"text": "one two three " * 70_000}) + "\n"
    (tmp_path / "text" / "a.jsonl.gz").write_bytes(gzip.compress(line.encode()) * 2000)
    out = tmp_path / "out"
    argv = ["fineweb.py", "--dataset", tmp_path / "text", "--workers", 2, "--shard_tokens", 50_000, "--out_dir", out]
    run = start_script(argv, **kwargs)
    wait_for(lambda: list(out.glob("*.npy")), run)
    return run


def test_ctrl_c_is_one_line(tmp_path):
    run = at_work(tmp_path, start_new_session=True)
    os.killpg(run.pid, signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("fineweb.py: interrupted; complete shards are kept")


def test_an_interrupt_while_the_first_shard_is_entered_leaves_what_goes_on(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS)
    build(tmp_path / "unbroken", wanted(source))

    def interrupt(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(UserError, match="interrupted"):
        patch.setattr(fineweb, "sha256", interrupt)
        build(tmp_path / "out", wanted(source))
    assert (tmp_path / "out" / "text_val_000000.npy").exists()
    build(tmp_path / "out", wanted(source))
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


@pytest.mark.slow
def test_sigterm_is_one_line_too(tmp_path):
    run = at_work(tmp_path)
    run.terminate()
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130
    assert error.splitlines()[-1].startswith("fineweb.py: interrupted; complete shards are kept")


def test_only_the_work_since_the_last_shard_is_done_again(tmp_path):
    source = write_parquet(tmp_path / "text" / "a.parquet", ["a b"] * 30, rows=5)
    write_parquet(tmp_path / "text" / "b.parquet", ["c d"] * 30, rows=5)
    manifest = wanted(source, 20)
    manifest.files, manifest.resume_at = {"a.parquet": 1, "b.parquet": 1}, [1, 12, 1]
    (batch,) = fineweb.read_batches([source / "b.parquet"], manifest)
    assert batch == Batch(Place(1, 12), 1.0, ["c d"] * 18)


def test_other_settings_are_refused_and_touch_nothing(tmp_path):
    source = write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS)
    other = write_parquet(tmp_path / "other" / "a.parquet", DOCUMENTS)
    out = tmp_path / "out"
    build(out, wanted(source))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    for settings, name in [
        (wanted(other), "dataset"),
        (wanted(source, 50), "shard_tokens"),
        (wanted(source, max_tokens=100), "max_tokens"),
        (Manifest(str(source), "", "v1", 100, None), "revision"),
        (Manifest(str(source), "sub", "main", 100, None), "subset"),
        (Manifest(str(source), "", "main", 100, None, tokenizer="other"), "tokenizer"),
    ]:
        with pytest.raises(UserError, match=f"{name} .*--out_dir"):
            build(out, settings)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before
    assert build(out, wanted(source)).complete  # done already


def test_a_shard_that_is_gone_or_cut_is_missed_when_the_run_goes_on_and_when_it_is_complete(tmp_path):
    source = write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS)
    build(tmp_path / "complete", wanted(source))
    assert killed_at(40, tmp_path / "begun", wanted(source))
    for out in (tmp_path / "complete", tmp_path / "begun"):
        assert len(Manifest.load(out).shards) > 2
        shard = out / "text_train_000001.npy"
        np.save(shard, np.load(shard)[:50])
        with pytest.raises(UserError, match=r"train_000001\.npy is not what"):
            build(out, wanted(source))
        shard.unlink()
        with pytest.raises(UserError, match=r"cannot read shard .*train_000001\.npy"):
            build(out, wanted(source))


def test_nothing_else_in_the_folder_is_touched(tmp_path):
    write_parquet(tmp_path / "downloads" / "a.parquet", DOCUMENTS)
    (tmp_path / "notes.txt").write_text("mine")
    build(tmp_path, wanted(tmp_path / "downloads"))
    assert (tmp_path / "downloads" / "a.parquet").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_source_that_is_repaired_before_the_first_shard_is_taken(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    (source / "wait...txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot read"):
        build(tmp_path / "out", wanted(source))
    (source / "wait...txt").write_text("some text")
    assert build(tmp_path / "out", wanted(source)).complete
    verify(tmp_path / "out")


def test_shards_of_another_make_are_not_overwritten(tmp_path):
    source = write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS)
    (tmp_path / "out").mkdir()
    np.save(tmp_path / "out" / "edufineweb_val_000000.npy", np.zeros(9, np.uint16))
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        build(tmp_path / "out", wanted(source))
    assert contents(tmp_path / "out") == before


def test_a_source_that_has_changed_is_refused(tmp_path):
    source = write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS)
    assert killed_at(20, tmp_path / "out", wanted(source))
    write_parquet(source / "a.parquet", DOCUMENTS[1:])
    with pytest.raises(UserError, match="not those of the start"):
        build(tmp_path / "out", wanted(source))


def test_two_at_once_in_one_folder_is_refused(tmp_path):
    from filelock import FileLock

    source = write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS)
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".fineweb_lock"),
        pytest.raises(UserError, match=r"another fineweb\.py is at work"),
    ):
        build(tmp_path / "out", wanted(source))
    assert build(tmp_path / "out", wanted(source)).complete


# ---------------------------------------------------------------- the manifest


@pytest.fixture
def made(tmp_path) -> Path:
    build(tmp_path / "out", wanted(write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS)))
    return tmp_path / "out"


def test_verify_finds_each_kind_of_damage(made):
    manifest, shard = made / "manifest.json", made / "text_train_000002.npy"
    verify(made)
    for path, change, message in [
        (shard, lambda b: b[:-2] + bytes([b[-2] ^ 1, b[-1]]), "these shards: text_train_000002.npy differ"),
        (shard, lambda b: b[:-2], "cannot read shard"),
        (shard, None, "cannot read shard"),
        (manifest, lambda b: b.replace(b'"complete": true', b'"complete": false'), "lacks shards: run"),
        (manifest, lambda b: b.replace(b'"tokens": 100', b'"tokens": 101', 1), "val_000000.npy is not what manifest"),
        (manifest, lambda b: b[:-20], "cannot read .*manifest.json"),
        (manifest, None, "cannot read .*manifest.json"),
    ]:
        good = path.read_bytes()
        path.unlink() if change is None else path.write_bytes(change(good))
        assert change is None or path.read_bytes() != good
        with pytest.raises(UserError, match=message):
            verify(made)
        path.write_bytes(good)
    (made / "more_train_000009.npy").write_bytes(shard.read_bytes())
    with pytest.raises(UserError, match="is not about these shards: more_train_000009.npy differ"):
        verify(made)


def test_a_manifest_that_lacks_something_is_refused(made):
    path = made / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shards": [{"name": "x_train_1.npy"}]}))
    with pytest.raises(UserError, match=r"cannot read .*manifest\.json"):
        Manifest.load(made)


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", b"PAR1 and no more", "cannot read .*a.parquet"),
        ("a.parquet", {"words": ["x"]}, "no field named text, only words: .* --text_column"),
        ("a.parquet", {"text": [1, 2]}, "row 0: text is int, not a string"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', "row 1: "),
        ("a.jsonl", b'{"text": "x"}\n{"words": "y"}\n', "row 1: .*text"),
        ("a.jsonl", b'"text"\n', "cannot read .*a.jsonl"),
        ("a.jsonl", b'{"text": 5}\n', "text is int, not a string"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "cannot read .*a.jsonl"),
        ("a.jsonl.gz", b"not gzip", "cannot read .*a.jsonl.gz"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9], "cannot read .*a.jsonl.gz"),
        ("a.txt", b"\xff\xfea\0", "cannot read .*a.txt .it is UTF-16"),
        ("a.txt", b"\xffa", "cannot read .*a.txt"),
        ("a.txt", b"a\n\0", "NUL bytes"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("a.txt", b"", None),
        ("a\nb.txt", b"\xff", "cannot read"),
        ("a.html", b"<html>", r"no \.parquet, .* files in"),
        ("a.jsonl", b'{"text": null}\n', "too little text"),
    ],
)
def test_files_that_cannot_be_read_are_named_with_the_row(tmp_path, capsys, name, content, message):
    path = tmp_path / "text" / name
    path.parent.mkdir()
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message or "too little text"):
        build(tmp_path / "out", wanted(path.parent))
    argv = ["--dataset", str(path.parent), "--out_dir", str(tmp_path / "out2"), "--workers", "1"]
    assert exit_status(partial(fineweb.main, argv), "fineweb.py") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("fineweb.py: ") for line in lines[-2:]] == [False, True][-len(lines) :]


def test_a_full_disk_is_named_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    source = write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS)
    build(tmp_path / "unbroken", wanted(source))
    out = tmp_path / "out"
    out.mkdir()

    def fill_up(number: int, real=os.fsync) -> None:
        if os.readlink(f"/proc/self/fd/{number}") == str(out / name):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", fill_up)
    for name in ["text_train_000003.npy.tmp", "manifest.json.tmp"]:
        argv = ["--dataset", str(source), "--out_dir", str(out), "--shard_tokens", "100", "--workers", "1"]
        assert exit_status(lambda argv=argv: fineweb.main(argv), "fineweb.py") == 1
        error = capsys.readouterr().err
        assert error.splitlines()[-1] == (
            f"fineweb.py: {out / name.removesuffix('.tmp')}: No space left on device; "
            "complete shards are kept, and the same command again resumes after them"
        )
        assert not (out / name).exists()
    assert len(list(out.glob("*.npy"))) >= 3
    assert Manifest.load(out).tokens >= 300
    name = ""
    fineweb.main(argv)
    assert contents(out) == contents(tmp_path / "unbroken")


def test_a_shard_that_is_written_in_part_is_named(tmp_path):
    source = write_parquet(tmp_path / "text" / "a.parquet", ["word " * 1000] * 300)
    out = tmp_path / "out"
    argv = ["fineweb.py", "--dataset", source, "--out_dir", out, "--workers", 1, "--shard_tokens", 100_000]
    limit = small_files(150_000)  # a shard has 200,128 bytes
    result = run_script(argv, preexec_fn=limit)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        f"fineweb.py: {out}/text_val_000000.npy: File too large; complete shards are kept"
    )
    assert not list(out.glob("*.npy*"))
    fineweb.main([*map(str, argv[1:])])
    assert verify(out).tokens > 300_000


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    source = write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS)
    (tmp_path / "file").write_text("")
    for out in [tmp_path / "file", tmp_path / "file" / "out"]:
        with pytest.raises(UserError, match=r"file/?.*(Not a directory|exists); complete shards are kept"):
            build(out, wanted(source))


# ---------------------------------------------------------------- progress


def test_a_terminal_sees_one_bar_and_a_file_a_line_for_each_shard(tmp_path, capsys):
    source = write_parquet(tmp_path / "text" / "a.parquet", long_texts(15))
    argv = ["--dataset", str(source), "--workers", "1", "--shard_tokens", "150000", "--out_dir"]
    fineweb.main([*argv, str(tmp_path / "a")])
    lines = capsys.readouterr().err.splitlines()
    names = [shard["name"] for shard in Manifest.load(tmp_path / "a").shards]
    assert len(names) > 3
    assert [line.partition(":")[0] for line in lines[1:-1]] == names
    assert lines[2].endswith(": 300,000 tokens so far")
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    run = subprocess.Popen([sys.executable, fineweb.__file__, *argv, tmp_path / "b"], stderr=end)
    os.close(end)
    shown = read_terminal(terminal)
    assert run.wait(60) == 0
    # The part that is done, how much that is of how much, the time taken and left.
    assert re.search(r"\d+%\|.*[\d.]+[kM]/[\d.]+[kM] \[\d\d:\d\d<\d\d:\d\d, .*tok/s\]", shown)
    assert "text_train" not in shown
    assert shown.count("\n") <= 3


def read_terminal(terminal: int) -> str:
    """All that is shown, until its other end is closed."""
    shown = b""
    while True:
        assert select.select([terminal], [], [], 120)[0], "it took too long"
        try:
            shown += os.read(terminal, 10_000)
        except OSError:  # it is closed
            return shown.decode()


# ---------------------------------------------------------------- the demo corpus


def test_the_demo_corpus_takes_no_folder_that_is_something_else(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="holds no shards"):
        fineweb.write_demo(tmp_path / "data")
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


def test_the_demo_corpus_is_prose_of_the_expected_size(tmp_path):
    fineweb.write_demo(tmp_path / "data")
    parts = shards(tmp_path / "data")
    assert (tmp_path / "data" / "demo_val_000000.npy").exists()
    assert [len(part) for part in parts[:-1]] == [40_000] * (len(parts) - 1)
    assert 200_000 < sum(map(len, parts)) < 600_000
    assert verify(tmp_path / "data").tokens == sum(map(len, parts))
    text = tokenizer().decode(parts[1].tolist())
    assert text.count(" the ") > 500


def test_the_demo_corpus_of_the_same_modules_is_always_the_same(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    for name in ("ast", "random", "textwrap"):
        shutil.copy(sys.modules[name].__file__, tmp_path / "modules")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "modules"))
    for name in ("a", "b"):
        fineweb.write_demo(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.slow
def test_the_demo_corpus_is_the_same_from_every_process(tmp_path):
    for name in ("a", "b"):
        assert run_script(["fineweb.py", "--demo", "--out_dir", tmp_path / name]).returncode == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# ---------------------------------------------------------------- and then


def test_train_gpt2_trains_on_the_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "text" / "a.parquet", DOCUMENTS)
    fineweb.main(["--dataset", "text", "--shard_tokens", "1000"])
    small = "--block_size 16 --n_layer 1 --n_head 1 --n_embd 8 --batch_tokens 64 --micro_batch 4 --max_steps 2"
    fast = "--device cpu --no-compile --warmup_steps 1 --val_tokens 64 --sample_every 0 --hellaswag_every 0"
    assert run_train([*small.split(), *fast.split(), "--data_dir", "text_shards"]) == 0
    log = [json.loads(line) for line in (tmp_path / "log" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if entry["event"] == "train"] == [1, 2]
    assert [entry["tokens"] for entry in log if entry["event"] == "val"]
