"""fineweb.py against a server on loopback that speaks the Hub's routes, through the real client."""

import gzip
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
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
from support.cli import exit_status
from support.tokens import END_OF_TEXT, encode_document, find_shards, open_shard, tokenizer


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
    fix = "it is deleted, and the same command downloads it again"
    assert re.match(f"fineweb.py: cannot read .*{path.name}, row 0: .*: {fix}", result.lines[-1])
    assert not path.exists()
    begun = Manifest.load(folder)
    assert not begun.complete
    assert begun.tokens >= 500
    edu.asked.clear()
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
    edu.fault = lambda request, path: False
    result = run(edu, tmp_path)
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
        (["--max_tokens", "1.5"], 2, "argument --max_tokens: invalid integer value: '1.5'"),
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
        (edu, "--dataset nobody/nothing", "there is no folder nobody/nothing, and no such dataset on the Hub: check"),
        (edu, "--revision v9", "the Hub: 404 .*--revision"),
        (edu, "--subset sample/1BT", "no folder sample/1BT, nor one of the configurations of .*: none"),
        ("http://127.0.0.1:9", "", "the Hub: .*refused.*: check the network, .* the same command again"),
    ]
    with ThreadPoolExecutor() as pool:  # all at once, as most of the time is spent in waiting
        results = list(pool.map(lambda case: run(case[0], tmp_path, *case[1].split()), cases))
    for (_, argv, message), result in zip(cases, results, strict=True):
        assert result.returncode == 1, argv
        assert len(result.lines) == 1, result.stderr
        assert re.match(f"fineweb.py: {message}", result.lines[0]), result.stderr
    assert not (tmp_path / "edu_fineweb10B").exists()


def test_a_disk_that_fills_up_during_a_download_is_not_taken_for_the_network(edu, tmp_path):
    limit = small_files(20_000)
    result = run(edu, tmp_path, preexec_fn=limit)
    assert result.returncode == 1
    assert re.match("fineweb.py: .*File too large; complete shards are kept", result.lines[-1])
    assert run(edu, tmp_path).returncode == 0


# ---------------------------------------------------------------- splits and configurations


def hub_files(*names: str) -> dict[str, bytes]:
    """Files whose one document is their name."""
    return {name: parquet([name]) for name in names}


README = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/*.parquet
  - split: dev_set
    path:
    - heldout/en-*.parquet
- config_name: de
  data_dir: de
  data_files: "**/*.parquet"
---
# A dataset
"""


@pytest.fixture
def languages(hub) -> Hub:
    files = hub_files("en/a.parquet", "en/deep/no.parquet", "heldout/en-1.parquet", "heldout/de-1.parquet",
                      "de/x/a.parquet", "de/b.parquet", "stray.parquet")  # fmt: skip
    hub.datasets["owner/languages"] = files | {"README.md": README.encode(), ".gitattributes": b"x"}
    return hub


def texts(folder: Path, split: str) -> list[str]:
    """The documents in a folder's shards of a split."""
    found = np.concatenate([open_shard(path) for path in sorted(folder.glob(f"*_{split}_*"))])
    return tokenizer().decode(found.tolist()).split("<|endoftext|>")[1:]


def test_splits_on_the_hub_are_used_as_such(hub, tmp_path):
    names = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
             "data/validation-00000-of-00001.parquet", "data/test-00000-of-00001.parquet")  # fmt: skip
    hub.datasets["owner/name"] = hub_files(*names) | {"README.md": b"no configurations"}
    result = run(hub, tmp_path, "--dataset", "owner/name")
    assert result.returncode == 0, result.stderr
    assert texts(tmp_path / "name_shards", "val") == [names[2]]
    assert texts(tmp_path / "name_shards", "train") == [*names[:2]]
    assert result.lines[0].endswith(f"; for validation: {names[2]}; left out: README.md, {names[3]}")
    assert not any("test-" in path for _, path in hub.asked)


def test_a_configuration_is_chosen_by_its_name(languages, tmp_path):
    result = run(languages, tmp_path, "--dataset", "owner/languages")
    assert result.returncode == 1
    line = "fineweb.py: choose by --subset one of the configurations of owner/languages: en, de"
    assert result.lines == [line]
    assert not list(tmp_path.glob("*_shards"))
    assert run(languages, tmp_path, "--dataset", "owner/languages", "--subset", "en").returncode == 0
    assert texts(tmp_path / "languages_shards", "val") == ["heldout/en-1.parquet"]
    assert texts(tmp_path / "languages_shards", "train") == ["en/a.parquet"]
    argv = ["--dataset", "owner/languages", "--out_dir", "de", "--subset"]
    assert run(languages, tmp_path, *argv, "fr").lines[-1] == (
        "fineweb.py: no folder fr, nor one of the configurations of owner/languages: en, de"
    )
    assert run(languages, tmp_path, *argv, "de").returncode == 0
    both = [encode_document(name) for name in ("de/b.parquet", "de/x/a.parquet")]
    assert np.array_equal(tokens(tmp_path / "de"), np.concatenate(both))
    assert run(languages, tmp_path, *argv[:2], "--out_dir", "folder", "--subset", "en/deep/").returncode == 0


@pytest.mark.parametrize("status", [403, pytest.param(500, marks=pytest.mark.slow)])
def test_configurations_that_cannot_be_read_are_no_reason_to_take_all(languages, tmp_path, status):
    languages.fault = lambda request, path: path == "README.md" and (request.answer(b"", status) or True)
    result = run(languages, tmp_path, "--dataset", "owner/languages", "--subset", "en")
    assert result.returncode == 1
    assert result.lines[-1].startswith("fineweb.py: the Hub: ")


def test_configurations_of_odd_names_and_of_the_hubs_own_conversion_are_listed(hub, tmp_path):
    readme = "---\nconfigs:\n- config_name: 2018\n  data_files: a/*\n- config_name: no\n  data_files:\n---\n"
    hub.datasets["owner/name"] = hub_files("a/x.parquet", "b/x.parquet") | {"README.md": readme.encode()}
    assert run(hub, tmp_path, "--dataset", "owner/name").lines[-1].endswith("of owner/name: 2018, False")
    assert run(hub, tmp_path, "--dataset", "owner/name", "--subset", "2018").returncode == 0
    hub.datasets["owner/other"] = hub_files("a/x.parquet", "b/x.parquet")
    result = run(hub, tmp_path, "--dataset", "owner/other", "--revision", "refs/convert/parquet")
    assert result.lines[-1].endswith("one of the configurations of owner/other: a, b")


def test_the_configuration_of_a_sample_of_fineweb_works_too(edu, tmp_path):
    readme = b"---\nconfigs:\n- config_name: default\n  data_files: data/*/*\n" \
        b"- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"  # fmt: skip
    edu.datasets["HuggingFaceFW/fineweb-edu"]["README.md"] = readme
    assert run(edu, tmp_path, "--subset", "sample-10BT").returncode == 0
    assert np.array_equal(tokens(tmp_path / "edu_fineweb10B"), STREAM)
    edu.asked.clear()
    assert run(edu, tmp_path, "--out_dir", "folder").returncode == 0
    assert not any("README" in path for _, path in edu.asked)
    for path in (tmp_path / "folder").glob("*.npy"):
        assert path.read_bytes() == (tmp_path / "edu_fineweb10B" / path.name).read_bytes()


def test_other_formats_come_from_the_hub_as_well(hub, tmp_path):
    compressed = gzip.compress(b'{"text": "one"}\n{"text": "two"}\n')
    hub.datasets["owner/name"] = {"a/b.jsonl.gz": compressed, "val.jsonl.gz": compressed, "c.txt": b"left out"}
    assert run(hub, tmp_path, "--dataset", "owner/name").returncode == 0
    assert texts(tmp_path / "name_shards", "val") == texts(tmp_path / "name_shards", "train") == ["one", "two"]


def test_a_repository_without_a_format_that_is_read_says_where_there_is_one(hub, tmp_path):
    hub.datasets["owner/name"] = {"script.py": b"", "README.md": b""}
    result = run(hub, tmp_path, "--dataset", "owner/name")
    assert result.returncode == 1
    assert "--revision refs/convert/parquet" in result.lines[-1]
    hub.datasets["owner/name"] = {"x_train_000001.bin": b"", "README.md": b""}
    result = run(hub, tmp_path, "--dataset", "owner/name")
    assert "these are shards: hf download owner/name --repo-type dataset --local-dir DIR" in result.lines[-1]


def test_ready_made_shards_are_fetched_by_the_hubs_own_command(hub, tmp_path):
    folder = write_shards(tmp_path / "made", [300], split="val", suffix="bin")
    write_shards(folder, [300, 200], suffix="bin")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.datasets["owner/shards"] = files
    command = ["download", "owner/shards", "--repo-type", "dataset", "--local-dir", tmp_path / "edu_bin"]
    program = Path(sys.executable).with_name("hf")
    subprocess.run([program, *command], env=os.environ | environment(hub, tmp_path), check=True, timeout=120)
    assert {path.name: path.read_bytes() for path in (tmp_path / "edu_bin").glob("*.bin")} == files
    assert len(find_shards(str(tmp_path / "edu_bin"), "train")) == 2


@pytest.mark.parametrize("at", ["listing", "file"])
def test_a_gated_dataset_says_where_to_ask_and_leaves_nothing(hub, tmp_path, at):
    hub.datasets["owner/gated"] = hub_files("a.parquet")

    def refuse(request, path):
        if path == "a.parquet" or at == "listing":
            request.answer(b"{}", 403, X_Error_Code="GatedRepo", X_Error_Message="x" * 400)
            return True
        return False

    hub.fault = refuse
    if at == "listing":
        hub.before_answer = refuse
    result = run(hub, tmp_path, "--dataset", "owner/gated", "--out_dir", "out")
    assert result.returncode == 1
    page = f"{hub.address}/datasets/owner/gated"
    assert result.lines[-1] == (
        f"fineweb.py: owner/gated is gated: ask for access at {page}, then run `hf auth login`, or set HF_TOKEN"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dataset", "status"), [("nobody/nothing", 404), ("owner/private", 401), ("owner/no", 403)])
def test_what_the_hub_refuses_is_not_asked_again(hub, tmp_path, dataset, status):
    def refuse(request, path):
        request.answer(b"{}", status, **({"X_Error_Code": "RepoNotFound"} if status != 403 else {}))
        return True

    hub.before_answer = refuse
    result = run(hub, tmp_path, "--dataset", dataset)
    assert result.returncode == 1
    assert sum(hub.asked.values()) == 1
    (line,) = result.lines
    wanted = "the Hub: .*403" if status == 403 else f"there is no folder {dataset}, and no such dataset on the Hub: "
    assert re.match(f"fineweb.py: {wanted}", line)


@pytest.mark.slow
def test_killed_at_any_time_a_run_with_splits_and_compressed_files_goes_on_to_the_same_bytes(hub, tmp_path):
    rows = [[json.dumps({"text": f"{name} {i} " * 20}) + "\n" for i in range(40)] for name in "abcd"]
    packed = [gzip.compress("".join(lines).encode()) for lines in rows]
    names = ["train/a.jsonl.gz", "val/a.jsonl.gz", "train/b.jsonl.gz", "val/b.jsonl.gz"]
    hub.datasets["owner/name"] = dict(zip(names, packed, strict=True)) | {"README.md": b""}
    script, argv = document_at_a_time(tmp_path), ["--dataset", "owner/name", "--out_dir"]
    assert run(hub, tmp_path, *argv, "unbroken", script=script).returncode == 0
    unbroken = {path.name: path.read_bytes() for path in (tmp_path / "unbroken").iterdir()}
    assert len(unbroken) > 8
    for n in (1, 2, 4):
        command = [script, "--shard_tokens", 500, "--workers", 1, *argv, n]
        process = start_script(command, env=environment(hub, tmp_path), cwd=tmp_path)
        out = tmp_path / str(n)
        wait_for(lambda: len(list(out.glob("*.npy"))) >= n, process)  # noqa: B023
        process.kill()
        process.communicate(timeout=60)
        assert run(hub, tmp_path, *argv, n, script=script).returncode == 0
        assert {path.name: path.read_bytes() for path in out.iterdir()} == unbroken
