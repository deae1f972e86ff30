"""fineweb.py against a server on loopback that speaks the Hub's routes, through the real client."""

import re
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import COMMIT, Hub, environment, run_script, small_files, start_script, wait_for, write_shards

import fineweb
from fineweb import Manifest, verify
from support.cli import UserError, exit_status
from support.tokens import END_OF_TEXT, encode_document, open_shard


def parquet(texts: list, column: str = "text") -> bytes:
    sink = pa.BufferOutputStream()
    # Random ids, so that the file is large enough to be cut.
    ids = np.random.default_rng(0).bytes(4000 * len(texts))
    columns = {"id": [ids[4000 * i : 4000 * (i + 1)] for i in range(len(texts))], column: pa.array(texts)}
    pq.write_table(pa.table(columns), sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


DOCUMENTS = [20, 40, 8, 8, 8]  # in each file; the first two have more than the 32 that are read ahead
TEXTS = [[f"File {i}, document {j}: <|endoftext|> é世\U0001f600 " * 9 for j in range(DOCUMENTS[i])] for i in range(5)]
TEXTS[1][2] = None
TEXTS[2][0] = ""
TEXTS[3][1] = "long " * 1000
STREAM = np.concatenate([encode_document(text) for texts in TEXTS for text in texts if text is not None])


@pytest.fixture
def edu(hub) -> Hub:
    """A Hub with five parquet files of FineWeb-Edu, and more that is not in the sample."""
    hub.datasets["HuggingFaceFW/fineweb-edu"] = {
        **{f"sample/10BT/{i:03d}_00000.parquet": parquet(texts) for i, texts in reversed([*enumerate(TEXTS)])},
        "sample/100BT/000_00000.parquet": parquet(["another sample"]),
        "README.md": b"no data",
    }
    return hub


def document_at_a_time(folder: Path) -> Path:
    """A script that is fineweb.py, but for its batches, each of which is one document."""
    path = folder / "document_at_a_time.py"
    main = "from support.cli import run_script; run_script(fineweb.main, 'fineweb.py')"
    path.write_text(f"import fineweb; fineweb.BATCH_CHARACTERS = 1; {main}")
    return path


def run(hub, tmp_path, *argv, script="fineweb.py", **kwargs):
    """fineweb.py in tmp_path; its standard error is split into lines."""
    argv = [script, "--shard_tokens", 500, "--workers", 1, *argv]
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
    assert list(manifest.files) == [f"sample/10BT/{i:03d}_00000.parquet" for i in range(5)]
    assert result.lines[0] == f"HuggingFaceFW/fineweb-edu at {COMMIT}: 5 files, 0.00 GB"
    assert result.lines[-1] == (
        f"edu_fineweb10B: {len(manifest.shards)} shards (a short last one is normal), "
        f"{len(STREAM):,} tokens, 83 documents"
    )
    assert "\r" not in result.stderr  # no bar where there is no terminal
    assert len(result.lines) == 2 + len(manifest.shards)
    assert not (tmp_path / "hf").exists() or not list((tmp_path / "hf").rglob("*.parquet"))

    edu.shutdown()  # it is complete: no network is needed to say so
    again = run("http://127.0.0.1:9", tmp_path)
    assert (again.returncode, again.lines) == (0, result.lines[-1:])


def test_only_max_tokens_and_two_files_at_a_time_are_downloaded(edu, tmp_path):
    found, ended = [], threading.Event()

    def look(request, path):
        found.append([p.name for p in (tmp_path / "out").rglob("*") if p.suffix in (".parquet", ".incomplete")])
        if "003" in path:
            ended.wait(120)

    edu.fault = look
    # 31 documents: what is read ahead of them ends in the third file, and nothing waits for the fourth.
    most = int(np.flatnonzero(STREAM == END_OF_TEXT)[31])
    result = run(edu, tmp_path, "--max_tokens", most, "--out_dir", "out", script=document_at_a_time(tmp_path))
    ended.set()
    assert result.returncode == 0, result.stderr
    assert np.array_equal(tokens(tmp_path / "out"), STREAM[:most])
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".npy", ".json"}
    assert max(map(len, found)) in (1, 2)  # the first may be gone when the second is asked for
    asked = " ".join(path for _, path in edu.asked)
    assert "002_00000" in asked
    assert "004_00000" not in asked


def test_keep_downloads_leaves_the_files_in_the_hubs_cache(edu, tmp_path):
    assert run(edu, tmp_path, "--keep_downloads").returncode == 0
    assert len(list((tmp_path / "hf").rglob("*.parquet"))) == 5
    edu.asked.clear()
    assert run(edu, tmp_path, "--keep_downloads", "--out_dir", "again").returncode == 0
    assert not any(command == "GET" and "resolve" in path for command, path in edu.asked)
    assert np.array_equal(tokens(tmp_path / "again"), STREAM)


def test_a_server_that_fails_for_a_while_is_asked_again(edu, tmp_path):
    failures = {"cut": 2, "reset": 2, "429": 1, "503": 2}
    files = {f"{i}.parquet": parquet(texts) for i, texts in enumerate(TEXTS)}
    edu.datasets = {f"owner/{kind}": files for kind in failures}
    asked = {kind: [] for kind in failures}

    def fault(request, path):
        if request.command != "GET" or path != "1.parquet":
            return False
        kind = request.path.split("/")[3]
        asked[kind].append(time.monotonic())
        if len(asked[kind]) > failures[kind]:
            return False
        if kind in ("cut", "reset"):
            request.send_response(200)
            for name, value in {"Content-Length": len(files[path]), "ETag": '"x"', "X-Repo-Commit": COMMIT}.items():
                request.send_header(name, str(value))
            request.end_headers()
            request.wfile.write(files[path][: len(files[path]) // 2])
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
    with ThreadPoolExecutor() as pool:  # all at once, as most of the time is spent in waiting
        argvs = [("--dataset", f"owner/{kind}", "--out_dir", kind) for kind in failures]
        results = list(pool.map(lambda argv: run(edu, tmp_path, *argv), argvs))
    for kind, result in zip(failures, results, strict=True):
        assert result.returncode == 0, (kind, result.stderr)
        assert len(asked[kind]) == failures[kind] + 1, kind
        assert np.array_equal(tokens(tmp_path / kind), STREAM), kind
    assert asked["429"][1] - asked["429"][0] >= 2


def test_a_run_goes_on_at_the_commit_of_its_start_after_a_file_that_is_damaged_on_the_hub(edu, tmp_path):
    files, name = edu.datasets["HuggingFaceFW/fineweb-edu"], "sample/10BT/002_00000.parquet"
    good, folder = files[name], tmp_path / "edu_fineweb10B"
    path = folder / ".fineweb_downloads" / name
    files[name] = good[:-100]
    result = run(edu, tmp_path, script=document_at_a_time(tmp_path))
    assert result.returncode == 1
    fix = "delete it if it was downloaded and run the same command again"
    assert re.match(f"fineweb.py: cannot read .*{path.name}, row 0: .*: {fix}", result.lines[-1])
    begun = Manifest.load(folder)
    assert not begun.complete
    assert begun.tokens >= 500
    edu.asked.clear()
    path.unlink()
    files[name] = good
    # What was new on the main branch since then doesn't count, and nothing is downloaded twice.
    files["sample/10BT/000_0000.parquet"] = parquet(["new"])
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
    assert "was begun with dataset" in result.lines[-1]
    assert verify(folder).dataset == str(text)


def test_killed_while_it_downloads_a_run_goes_on_and_leaves_nothing_behind(edu, tmp_path):
    waiting, go = threading.Event(), threading.Event()

    def fault(request, path):
        if request.command == "GET" and "002" in path and not go.is_set():
            waiting.set()
            request.send_response(200)
            request.send_header("Content-Length", "100000000")
            request.end_headers()
            request.wfile.write(b"P" * 20_000_000)  # more than the client's buffer
            go.wait(120)
            request.close_connection = True
            return True
        return False

    edu.fault = fault
    argv = ["fineweb.py", "--shard_tokens", 500, "--workers", 2]
    process = start_script(argv, env=environment(edu, tmp_path), cwd=tmp_path)
    assert waiting.wait(120)
    folder = tmp_path / "edu_fineweb10B"
    wait_for(lambda: list(folder.rglob("*.incomplete")), process)
    process.kill()
    process.communicate(timeout=60)
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
        if request.command == "GET" and "002" in path:
            waiting.set()
            go.wait(120)
        return False

    edu.fault = fault
    argv = [document_at_a_time(tmp_path), "--shard_tokens", 500, "--workers", 1]
    process = start_script(argv, env=environment(edu, tmp_path), cwd=tmp_path)
    assert waiting.wait(120)
    wait_for(lambda: list((tmp_path / "edu_fineweb10B").glob("*.npy")), process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    go.set()
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("fineweb.py: interrupted; complete shards are kept")
    assert "Traceback" not in err


BOUNDS = "--shard_tokens, --workers and --max_tokens must be above 0"


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--dataset", "/no/such/folder"], 1, "there is no folder /no/such/folder"),
        (["--dataset", "my_texts"], 1, "there is no folder my_texts"),
        (["--dataset", ""], 1, "there is no folder "),
        (["--verify"], 1, "cannot read edu_fineweb10B/manifest.json"),
        (["--shard_tokens", "0"], 2, BOUNDS),
        (["--workers", "0"], 2, BOUNDS),
        (["--max_tokens", "0"], 2, BOUNDS),
        (["--max_tokens", "-1"], 2, BOUNDS),
        (["--max_tokens", "1e9"], 2, "argument --max_tokens: invalid int value: '1e9'"),
    ],
)
def test_what_cannot_be_had_is_one_line(tmp_path, monkeypatch, capsys, argv, status, message):
    monkeypatch.chdir(tmp_path)
    assert exit_status(partial(fineweb.main, argv), "fineweb.py") == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fineweb.py: {message}")
    assert not list(tmp_path.iterdir())


def test_no_network_and_what_cannot_be_had_from_the_hub_are_one_line(edu, tmp_path):
    cases = [
        (edu, "--dataset nobody/nothing", "the Hub: 404 .*check the network, --dataset, --subset and --revision"),
        (edu, "--revision v9", "the Hub: 404 .*--revision"),
        (edu, "--subset sample/1BT", "no .parquet files in HuggingFaceFW/fineweb-edu/sample/1BT: check"),
        ("http://127.0.0.1:9", "", "the Hub: .*refused.*: check the network, .* the same command again"),
    ]
    with ThreadPoolExecutor() as pool:  # all at once, as most of the time is spent in waiting
        results = list(pool.map(lambda case: run(case[0], tmp_path, *case[1].split()), cases))
    for (_, argv, message), result in zip(cases, results, strict=True):
        assert result.returncode == 1, argv
        assert len(result.lines) == 1, result.stderr
        assert re.match(f"fineweb.py: {message}", result.lines[0]), result.stderr
    assert not (tmp_path / "edu_fineweb10B").exists()


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
    folder, files = tmp_path / "fineweb10B-gpt2_shards", shards.datasets["owner/fineweb10B-gpt2"]
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3))]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "manifest.json"])
    assert all((folder / name).read_bytes() == files[name] for name in names)
    manifest = verify(folder)
    assert [shard["name"] for shard in manifest.shards] == names
    assert [line.partition(":")[0] for line in result.lines[1:-1]] == names
    assert manifest.tokens == 1100
    assert manifest.complete


@pytest.mark.parametrize(("most", "number"), [(1, 2), (300, 2), (301, 2), (600, 2), (601, 3), (5000, 4)])
def test_max_tokens_limits_the_ready_made_shards(shards, most, number):
    files = {name: len(content) for name, content in shards.datasets["owner/fineweb10B-gpt2"].items()}
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in (1, 2, 3))]
    assert fineweb.ready_made_shards(files, most) == names[:number]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda good: b"\0" + good[1:], "no header of a version 1 token file"),
        (lambda good: good[:-2], "mmap length is greater than file size"),
        (lambda good: good + b"\0\0", "its header promises 300 tokens"),
        (lambda good: good[:-2] + (50257).to_bytes(2, "little"), "holds token 50257"),
    ],
)
def test_a_ready_made_shard_that_is_damaged_is_refused(shards, tmp_path, bad, message):
    files, name = shards.datasets["owner/fineweb10B-gpt2"], "fineweb_train_000002.bin"
    (tmp_path / name).write_bytes(bad(files[name]))
    manifest = Manifest("owner/fineweb10B-gpt2", "", "main", 100, None, files={name: 0})
    with pytest.raises(UserError, match=f"{name}.* {message}"):
        fineweb.take_shards([tmp_path / name], tmp_path / "out", manifest)
    assert not manifest.shards


def test_a_bad_ready_made_shard_is_named_and_the_good_ones_stay(shards, tmp_path):
    files, name = shards.datasets["owner/fineweb10B-gpt2"], "fineweb_train_000002.bin"
    good, folder = files[name], tmp_path / "fineweb10B-gpt2_shards"
    argv = ["--dataset", "owner/fineweb10B-gpt2", "--max_tokens", 601]  # without the last one
    files[name] = b"\0" + good[1:]
    result = run(shards, tmp_path, *argv)
    assert result.returncode == 1
    assert name in result.lines[-1]
    found = sorted(path.name for path in folder.glob("*.bin"))
    assert found == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    files[name] = good
    (folder / ".fineweb_downloads" / name).unlink()
    assert run(shards, tmp_path, *argv).returncode == 0
    assert verify(folder).tokens == 900
    assert not any("000003" in path for _, path in shards.asked)


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
