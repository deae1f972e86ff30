"""fineweb.py against a server on loopback that speaks the Hub's routes, through the real client."""

import json
import re
import signal
import socket
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import COMMIT, Hub, environment, run_script, small_files, start_script, write_shards

import fineweb
from fineweb import Manifest, verify
from support.tokens import encode_document, open_shard


def parquet(texts: list, column: str = "text") -> bytes:
    sink = pa.BufferOutputStream()
    # Random ids, so that the file is large enough to be cut.
    ids = np.random.default_rng(0).bytes(4000 * len(texts))
    columns = {"id": [ids[4000 * i : 4000 * (i + 1)] for i in range(len(texts))], column: pa.array(texts)}
    pq.write_table(pa.table(columns), sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


TEXTS = [[f"File {i}, document {j}: <|endoftext|> é世\U0001f600 " * 9 for j in range(8)] for i in range(4)]
TEXTS[1][2] = None
TEXTS[2][0] = ""
TEXTS[3][1] = "long " * 1000
STREAM = np.concatenate([encode_document(text) for texts in TEXTS for text in texts if text is not None])


@pytest.fixture
def edu(hub) -> Hub:
    """A Hub with four parquet files of FineWeb-Edu, and more that is not in the sample."""
    hub.datasets["HuggingFaceFW/fineweb-edu"] = {
        **{f"sample/10BT/{i:03d}_00000.parquet": parquet(texts) for i, texts in reversed([*enumerate(TEXTS)])},
        "sample/100BT/000_00000.parquet": parquet(["another sample"]),
        "README.md": b"no data",
    }
    return hub


def run(hub, tmp_path, *argv, **kwargs):
    """fineweb.py in tmp_path; its standard error is split into lines."""
    argv = ["fineweb.py", "--shard_tokens", 500, "--workers", 1, *argv]
    result = run_script(argv, env=environment(hub, tmp_path), cwd=tmp_path, **kwargs)
    result.lines = result.stderr.splitlines()
    assert "Traceback" not in result.stderr
    return result


def tokens(folder: Path) -> np.ndarray:
    paths = sorted(folder.glob("*_[0-9]*"), key=lambda path: path.name[-10:])
    return np.concatenate([open_shard(path) for path in paths])


def test_the_sample_of_fineweb_edu_becomes_shards_named_as_its_users_have_them(edu, tmp_path):
    result = run(edu, tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "edu_fineweb10B"
    assert np.array_equal(tokens(folder), STREAM)
    names = sorted(path.name for path in folder.iterdir())
    assert names[:2] == ["edufineweb_train_000001.npy", "edufineweb_train_000002.npy"]
    assert names[-2:] == ["edufineweb_val_000000.npy", "manifest.json"]  # and nothing that was downloaded
    manifest = verify(folder)
    assert (manifest.dataset, manifest.subset) == ("HuggingFaceFW/fineweb-edu", "sample/10BT")
    assert (manifest.revision, manifest.commit) == ("main", COMMIT)
    assert list(manifest.files) == [f"sample/10BT/{i:03d}_00000.parquet" for i in range(4)]
    assert result.lines[0] == f"HuggingFaceFW/fineweb-edu at {COMMIT}: 4 files, 0.00 GB"
    assert result.lines[-1] == (
        f"edu_fineweb10B: {len(manifest.shards)} shards (a short last one is normal), "
        f"{len(STREAM):,} tokens, 31 documents"
    )
    assert "\r" not in result.stderr  # no bar where there is no terminal
    assert len(result.lines) == 2 + len(manifest.shards)
    assert not (tmp_path / "hf").exists() or not list((tmp_path / "hf").rglob("*.parquet"))

    edu.shutdown()  # it is complete: no network is needed to say so
    again = run("http://127.0.0.1:9", tmp_path)
    assert (again.returncode, again.lines) == (0, result.lines[-1:])


def test_only_max_tokens_and_two_files_at_a_time_are_downloaded(edu, tmp_path):
    most = 0
    folder = tmp_path / "edu_fineweb10B"

    def look(request, path):
        nonlocal most
        there = [p for p in folder.rglob("*") if p.suffix in (".parquet", ".incomplete")]
        most = max(most, len(there))

    edu.fault = look
    assert run(edu, tmp_path).returncode == 0
    assert most == 2
    edu.asked.clear()
    result = run(edu, tmp_path, "--max_tokens", 700, "--out_dir", "small")
    assert result.returncode == 0, result.stderr
    assert np.array_equal(tokens(tmp_path / "small"), STREAM[:700])
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == [
        "edufineweb_train_000001.npy",
        "edufineweb_val_000000.npy",
        "manifest.json",
    ]
    assert not any("003_00000" in path for _, path in edu.asked)


def test_keep_downloads_leaves_the_files_in_the_hubs_cache(edu, tmp_path):
    assert run(edu, tmp_path, "--keep_downloads").returncode == 0
    assert len(list((tmp_path / "hf").rglob("*.parquet"))) == 4
    edu.asked.clear()
    assert run(edu, tmp_path, "--keep_downloads", "--out_dir", "again").returncode == 0
    assert not any(command == "GET" and "resolve" in path for command, path in edu.asked)
    assert np.array_equal(tokens(tmp_path / "again"), STREAM)


@pytest.mark.parametrize("kind", ["cut", "reset", "429", "503"])
def test_a_server_that_fails_for_a_while_is_asked_again(edu, tmp_path, kind):
    failed = []

    def fault(request, path):
        if request.command != "GET" or "001" not in path or len(failed) >= 2:
            return False
        failed.append(time.monotonic())
        if kind in ("cut", "reset"):
            content = edu.datasets["HuggingFaceFW/fineweb-edu"][path]
            request.send_response(200)
            for name, value in {"Content-Length": len(content), "ETag": '"x"', "X-Repo-Commit": COMMIT}.items():
                request.send_header(name, str(value))
            request.end_headers()
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            if kind == "reset":
                time.sleep(0.1)
                request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
            request.close_connection = True
        else:
            request.answer(b"", int(kind), Retry_After="2")
        return True

    edu.fault = fault
    result = run(edu, tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(failed) == 2
    assert np.array_equal(tokens(tmp_path / "edu_fineweb10B"), STREAM)
    if kind == "429":
        assert failed[1] - failed[0] >= 2


def test_a_run_goes_on_at_the_commit_of_its_start_and_downloads_nothing_twice(edu, tmp_path):
    edu.fault = lambda request, path: "002" in path and request.answer(b"", 403) is None
    result = run(edu, tmp_path)
    assert result.returncode == 1
    assert "complete shards are kept, and the same command again goes on after them" in result.lines[-1]
    folder = tmp_path / "edu_fineweb10B"
    begun = Manifest.load(folder)
    assert not begun.complete
    assert begun.tokens >= 500
    edu.fault = lambda request, path: False
    edu.asked.clear()
    # What was new on the main branch since then doesn't count.
    edu.datasets["HuggingFaceFW/fineweb-edu"]["sample/10BT/000_0000.parquet"] = parquet(["new"])
    assert run(edu, tmp_path).returncode == 0
    assert np.array_equal(tokens(folder), STREAM)
    assert not any("/api/" in path for _, path in edu.asked)
    assert not any("000_00000" in path for _, path in edu.asked)
    assert all(f"/resolve/{COMMIT}/" in path for _, path in edu.asked)
    assert list(Manifest.load(folder).files) == list(begun.files)


def test_what_another_run_made_in_the_meantime_is_not_overwritten(edu, tmp_path):
    folder, text = tmp_path / "edu_fineweb10B", tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("some other text")
    edu.before_listing = lambda: fineweb.build(folder, Manifest(str(text), "", "main", 100, None))
    result = run(edu, tmp_path)
    assert result.returncode == 1
    assert "has shards with dataset" in result.lines[-1]
    assert verify(folder).dataset == str(text)


def test_killed_while_it_downloads_a_run_goes_on_and_leaves_nothing_behind(edu, tmp_path):
    waiting, go = threading.Event(), threading.Event()

    def fault(request, path):
        if request.command == "GET" and "002" in path and not go.is_set():
            waiting.set()
            request.send_response(200)
            request.send_header("Content-Length", "100000000")
            request.end_headers()
            request.wfile.write(b"P" * 50_000_000)  # more than the client's buffer
            go.wait(60)
            request.close_connection = True
            return True
        return False

    edu.fault = fault
    process = start_script(
        ["fineweb.py", "--shard_tokens", 500, "--workers", 2], env=environment(edu, tmp_path), cwd=tmp_path
    )
    assert waiting.wait(60)
    folder = tmp_path / "edu_fineweb10B"
    while not list(folder.rglob("*.incomplete")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    go.set()
    left = list(folder.rglob("*.incomplete"))
    assert left
    still = []
    edu.fault = lambda request, path: still.extend(path for path in left if path.exists())
    result = run(edu, tmp_path)
    assert not still
    assert result.returncode == 0, result.stderr
    assert np.array_equal(tokens(folder), STREAM)
    assert not [path for path in folder.iterdir() if path.suffix not in (".npy", ".json")]


def test_interrupted_while_it_downloads_it_ends_at_once(edu, tmp_path):
    waiting, go = threading.Event(), threading.Event()

    def fault(request, path):
        if request.command == "GET" and "001" in path:
            waiting.set()
            go.wait(60)
        return False

    edu.fault = fault
    process = start_script(
        ["fineweb.py", "--shard_tokens", 100, "--workers", 1], env=environment(edu, tmp_path), cwd=tmp_path
    )
    assert waiting.wait(60)
    while not list((tmp_path / "edu_fineweb10B").glob("*.npy")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    go.set()
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("fineweb.py: interrupted; complete shards are kept")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "nobody/nothing"], "the Hub: 404 .*check the network, --dataset, --subset and --revision"),
        (["--revision", "v9"], "the Hub: 404 .*--revision"),
        (["--subset", "sample/1BT"], "no .parquet files in HuggingFaceFW/fineweb-edu/sample/1BT: check"),
        (["--dataset", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["--dataset", "my_texts"], "there is no folder my_texts"),
        (["--dataset", ""], "--dataset is empty"),
        (["--max_tokens", "1"], "--max_tokens 1 must be from 2"),
        (["--shard_tokens", "0"], "--shard_tokens 0 must be from 1"),
        (["--workers", "0"], "--workers 0 must be from 1"),
        (["--max_tokens", "1e9"], "argument --max_tokens: invalid int value: '1e9'"),
        (["--demo", "--max_tokens", "5"], "--demo takes no --shard_tokens"),
        (["--verify"], "cannot read edu_fineweb10B/manifest.json"),
    ],
)
def test_what_cannot_be_had_is_one_line(edu, tmp_path, argv, message):
    result = run(edu, tmp_path, *argv)
    assert result.returncode == (
        2 if "must be from" in message or "argument" in message or "demo" in message or "empty" in message else 1
    )
    assert re.match(f"fineweb.py: {message}", result.lines[-1]), result.stderr
    assert len(result.lines) == 1
    assert not (tmp_path / "edu_fineweb10B").exists()


def test_no_network_is_one_line(tmp_path):
    result = run("http://127.0.0.1:9", tmp_path)
    assert result.returncode == 1
    assert len(result.lines) == 1
    assert re.match("fineweb.py: the Hub: .*refused.*: check the network, .* the same command again", result.lines[-1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            parquet(["x"] * 9)[:-100],
            "cannot read .*/edu_fineweb10B/.fineweb_downloads/sample/10BT/001_00000.parquet, row 0: ",
        ),
        (parquet(["x"], "words"), "cannot read .*001_00000.parquet, row 0: no column named text, only id, words"),
    ],
)
def test_a_file_that_is_damaged_on_the_hub_is_named_and_can_be_fetched_anew(edu, tmp_path, content, message):
    name = "sample/10BT/001_00000.parquet"
    good = edu.datasets["HuggingFaceFW/fineweb-edu"][name]
    edu.datasets["HuggingFaceFW/fineweb-edu"][name] = content
    result = run(edu, tmp_path)
    assert result.returncode == 1
    assert re.match(f"fineweb.py: {message}", result.lines[-1])
    assert "delete it if it was downloaded" in result.lines[-1]
    edu.datasets["HuggingFaceFW/fineweb-edu"][name] = good
    (tmp_path / "edu_fineweb10B" / ".fineweb_downloads" / name).unlink()
    assert run(edu, tmp_path).returncode == 0
    assert np.array_equal(tokens(tmp_path / "edu_fineweb10B"), STREAM)


# ---------------------------------------------------------------- ready-made shards


@pytest.fixture
def shards(hub, tmp_path) -> Hub:
    """A Hub with a dataset of .bin shards: one for validation, three to train on, of 300 tokens each."""
    folder = write_shards(tmp_path / "made", [300], split="val", suffix="bin")
    write_shards(folder, [300, 300, 200], suffix="bin")
    files = {path.name.replace("tiny", "fineweb"): path.read_bytes() for path in folder.iterdir()}
    hub.datasets["owner/fineweb10B-gpt2"] = {**files, "README.md": b"", "other.bin": b""}
    return hub


def test_ready_made_shards_are_taken_as_they_are(shards, tmp_path):
    result = run(shards, tmp_path, "--dataset", "owner/fineweb10B-gpt2")
    assert result.returncode == 0, result.stderr
    folder, files = tmp_path / "edu_fineweb10B", shards.datasets["owner/fineweb10B-gpt2"]
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3))]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "manifest.json"])
    assert all((folder / name).read_bytes() == files[name] for name in names)
    manifest = verify(folder)
    assert [shard["name"] for shard in manifest.shards] == names
    assert [line.partition(":")[0] for line in result.lines[1:-1]] == names
    assert manifest.tokens == 1100
    assert manifest.complete


@pytest.mark.parametrize(("most", "number"), [(2, 2), (300, 2), (301, 2), (600, 2), (601, 3), (5000, 4)])
def test_max_tokens_limits_the_ready_made_shards(shards, tmp_path, most, number):
    result = run(shards, tmp_path, "--dataset", "owner/fineweb10B-gpt2", "--max_tokens", most)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "edu_fineweb10B").glob("*.bin"))) == number
    assert verify(tmp_path / "edu_fineweb10B").complete


@pytest.mark.parametrize("kind", ["magic", "short", "id"])
def test_a_bad_ready_made_shard_is_refused_and_the_good_ones_stay(shards, tmp_path, kind):
    files, name = shards.datasets["owner/fineweb10B-gpt2"], "fineweb_train_000002.bin"
    good = files[name]
    bad = {"magic": b"\0" + good[1:], "short": good[:-2], "id": good[:-2] + (50257).to_bytes(2, "little")}[kind]
    files[name] = bad
    result = run(shards, tmp_path, "--dataset", "owner/fineweb10B-gpt2")
    assert result.returncode == 1
    assert name in result.lines[-1]
    folder = tmp_path / "edu_fineweb10B"
    assert sorted(path.name for path in folder.glob("*.bin")) == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    files[name] = good
    (folder / ".fineweb_downloads" / name).unlink()
    assert run(shards, tmp_path, "--dataset", "owner/fineweb10B-gpt2").returncode == 0
    assert verify(folder).tokens == 1100


def test_ready_made_shards_of_the_same_name_are_refused(shards, tmp_path):
    files = shards.datasets["owner/fineweb10B-gpt2"]
    files["more/fineweb_train_000001.bin"] = files["fineweb_train_000001.bin"]
    result = run(shards, tmp_path, "--dataset", "owner/fineweb10B-gpt2")
    assert result.returncode == 1
    assert "have the same name: choose a folder of it with --subset" in result.lines[-1]


def test_a_disk_that_fills_up_during_a_download_is_not_taken_for_the_network(edu, tmp_path):
    limit = small_files(20_000)
    result = run(edu, tmp_path, preexec_fn=limit)
    assert result.returncode == 1
    assert re.match("fineweb.py: .*File too large; complete shards are kept", result.lines[-1])
    assert run(edu, tmp_path).returncode == 0


# ---------------------------------------------------------------- and then


def test_train_gpt2_trains_on_the_result_without_another_flag_for_the_data(edu, tmp_path):
    assert run(edu, tmp_path, "--shard_tokens", 100_000, "--max_tokens", 1500).returncode == 0
    small = "--block_size 16 --n_layer 1 --n_head 1 --n_embd 8 --batch_tokens 64 --micro_batch 4 --max_steps 2".split()
    argv = ["train_gpt2.py", "--device", "cpu", "--no-compile", *small, "--warmup_steps", 1, "--sample_every", 0]
    result = run_script([*argv, "--hellaswag_every", 0], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    log = [json.loads(line) for line in (tmp_path / "log" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if entry["event"] == "train"] == [1, 2]
    assert [entry["tokens"] for entry in log if entry["event"] == "val"]
