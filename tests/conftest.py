"""A tiny model, shards to feed it, ways to run the scripts as a user would, and a server that stands for the Hub."""

import gc
import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import nullcontext
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from urllib.parse import unquote

import hooks
import numpy as np
import pytest
import torch
from hooks import before_each_step
from transformers import GPT2Config, GPT2LMHeadModel

import train_gpt2
from support import checkpoint
from support.cli import exit_status
from support.cli import run_script as end_with
from support.log import read_log
from support.world import World
from train_gpt2 import GPTConfig

ROOT = Path(__file__).resolve().parent.parent
signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells ignore in what they run in the background,
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this
torch.set_num_threads(1)  # as in the processes below, so that sums add up in the same order
TINY = GPTConfig(block_size=16, vocab_size=96, n_layer=2, n_head=2, n_embd=16)
CPU = World(rank=0, size=1, device=torch.device("cpu"), dtype=torch.float32)


def write_shards(folder: Path, lengths: list[int], split: str = "train", suffix: str = "npy") -> Path:
    """Shards of random tokens below 96; the numbers go on from those in the folder."""
    folder.mkdir(exist_ok=True)
    for length in lengths:
        number = len(list(folder.iterdir()))
        # Small ids are likelier, so that there is something to learn.
        tokens = (96 * np.random.default_rng(number).random(length) ** 3).astype(np.uint16)
        path = folder / f"tiny_{split}_{number:06d}.{suffix}"
        if suffix == "npy":
            np.save(path, tokens)
        else:
            header = np.zeros(256, dtype=np.int32)
            header[:3] = 20240520, 1, length
            path.write_bytes(header.tobytes() + tokens.tobytes())
    return folder


@pytest.fixture(autouse=True)
def pictures_on_request_only(request, monkeypatch):
    """Drawing takes a third of the time of runs as small as these: only tests with the marker `picture` draw."""
    if "picture" not in request.keywords:
        monkeypatch.setattr("support.log.draw_curves", lambda log_path, picture: None)


@pytest.fixture
def shards(tmp_path) -> Path:
    """A folder with one validation shard and three training shards of uneven lengths: 20 training sequences."""
    folder = write_shards(tmp_path / "data", [200], split="val")
    return write_shards(folder, [130, 97, 111])


def tiny_flags(data_dir, out_dir, **changes) -> list[str]:
    """A command line for a run of six steps of 128 tokens, which is 8 sequences: over two epochs of `shards`.

    The shape is TINY's, or, with init_from, that of those weights.
    """
    shape = {} if "init_from" in changes else vars(TINY)
    flags = dict(data_dir=data_dir, out_dir=out_dir, device="cpu", dtype="float32", compile=False, **shape,
                 max_steps=6, warmup_steps=2, max_lr=1e-2, min_lr=1e-3, batch_tokens=128, micro_batch=4,
                 val_tokens=160, eval_every=3, hellaswag_every=0,
                 sample_every=0, save_every=2, prompt="!") | changes  # fmt: skip
    line = []
    for name, value in flags.items():
        line += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return line


def run_train(argv: list) -> int:
    """train_gpt2.py within this process; returns its exit status."""
    return exit_status(partial(train_gpt2.main, [str(a) for a in argv]), "train_gpt2.py")


def start_script(argv: list, ranks: int = 1, **kwargs) -> subprocess.Popen:
    """A script of the project in a process of its own, under torchrun if there are several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *kwargs.pop("torchrun", [])]
    torchrun = torchrun if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | kwargs.pop("env", {})
    argv = [sys.executable, *torchrun, str(ROOT / argv[0]), *map(str, argv[1:])]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, env=environment, text=True, stdout=pipe, stderr=pipe, **kwargs)


def run_script(argv: list, ranks: int = 1, timeout: float = 150, **kwargs) -> subprocess.CompletedProcess:
    """Run a script to its end."""
    process = start_script(argv, ranks, **kwargs)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def be_a_child(function, arguments: tuple, out: str | None, err: str) -> None:
    """What a forked process runs; with 8 GiB of address space, so that what is too much fails at once."""
    gc.freeze()  # what it shares with its parent would be copied, page by page, when it is looked through for garbage
    for path, number in ((out, 1), (err, 2)):
        if path:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
    torch.set_num_threads(1)
    function(*arguments)


def be_a_script(module: str, argv: list[str], cwd: str | None, variables: dict[str, str], hook: str | None) -> None:
    """Run a script's main() to the end of the process, with a hook of hooks.py before each step."""
    os.chdir(cwd or os.getcwd())
    os.environ.update(variables)
    with before_each_step(getattr(hooks, hook)) if hook else nullcontext():
        end_with(partial(sys.modules[module].main, argv), f"{module}.py")


@cache
def forkserver():
    """Makes processes that start at once, as they are forked from one that has imported all."""
    context = multiprocessing.get_context("forkserver")
    drawing = ["matplotlib.figure", "matplotlib.backends.backend_agg"]
    libraries = ["transformers", "pyarrow.parquet", "huggingface_hub", "tqdm"]
    context.set_forkserver_preload(["train_gpt2", "hellaswag", *drawing, *libraries, "conftest"])
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"  # not every Python hands on where it imports from
    ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


def start_forked(
    argv: list, out: Path, err: Path, cwd: str | None = None, variables: dict | None = None, hook: str | None = None
) -> multiprocessing.Process:
    """A script in a process of its own, of a forkserver()."""
    module = str(argv[0]).removesuffix(".py")
    arguments = (module, [str(a) for a in argv[1:]], cwd, variables or {}, hook)
    process = forkserver().Process(target=be_a_child, args=(be_a_script, arguments, str(out), str(err)))
    process.start()
    return process


def end(process: multiprocessing.Process, timeout: float) -> None:
    """Wait for a process; one that takes longer than `timeout` seconds is killed, and fails the test."""
    process.join(timeout)
    alive = process.is_alive()
    process.kill()
    process.join()
    assert not alive, f"still running after {timeout} s"


def run_forked(
    argv: list, folder: Path, timeout: float = 600, cwd: str | None = None, ranks: int = 1, hook: str | None = None
) -> subprocess.CompletedProcess:
    """start_forked() to its end, of several ranks as torchrun would start them; the worst status of all."""
    processes, port = [], free_port()
    for rank in range(ranks):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        variables = {name: str(value) for name, value in variables.items()} if ranks > 1 else {}
        paths = (folder / f"stdout_{rank}", folder / f"stderr_{rank}")
        processes.append(start_forked(argv, *paths, cwd, variables, hook))
    for process in processes:
        end(process, timeout)
    out, err = (
        "".join((folder / f"{name}_{rank}").read_text(errors="replace") for rank in range(ranks))
        for name in ("stdout", "stderr")
    )
    return subprocess.CompletedProcess(argv, max((p.exitcode for p in processes), key=abs), out, err)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def in_a_child(function, *arguments, timeout: float) -> None:
    """Call a function of a test module in a process of its own, which must neither fail nor take too long."""
    with tempfile.NamedTemporaryFile() as err:
        process = forkserver().Process(target=be_a_child, args=(function, arguments, None, err.name))
        process.start()
        end(process, timeout)
        assert process.exitcode == 0, f"status {process.exitcode}: {err.read().decode(errors='replace')}"


def assert_one_line(result: subprocess.CompletedProcess) -> None:
    """A run ended in success, or in one line on stderr, and the status that goes with it; news aside, and warnings."""
    news = ("warning: ", "weights of ")
    lines = [line for line in result.stderr.splitlines() if not line.startswith(news)]
    ends = [line for line in lines if re.match(r"(train_gpt2|fineweb|hellaswag)\.py: .{10,}", line)]
    assert "Traceback" not in result.stderr, (result.args, result.stderr)
    assert result.returncode in (0, 1, 2), (result.args, result.returncode, result.stderr)
    if result.returncode:
        assert len(ends) == 1, (result.args, result.stderr)
        assert ends == lines[-1:], (result.args, result.stderr)
        assert len(lines) == 1 or not ends[0].startswith("train_gpt2"), (result.args, result.stderr)


def wait_for(condition, process, timeout: float = 120) -> None:
    """Until condition() holds; fails if the process ends before that, or it takes longer."""
    end = time.monotonic() + timeout
    while not condition():
        ended = process.exitcode if isinstance(process, multiprocessing.process.BaseProcess) else process.poll()
        assert ended is None, "the process ended too early"
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.001)


def small_files(size: int):
    """For run_script(preexec_fn=...): the process can't write files of more bytes, as on a full disk."""
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


def stop_after(step, flags):
    """Run until all of `step` is done, then leave by an exception, as a run that is killed there."""

    class Stop(BaseException):
        pass

    def stop(at, model):
        if at == step + 1:
            raise Stop

    with pytest.raises(Stop), before_each_step(stop):
        run_train(flags)


def assert_resumes_bitwise(make_flags, shards, tmp_path) -> None:
    """A run that is stopped after step 3 and started again ends as one that was not."""
    unbroken, stopped = (make_flags(shards, tmp_path / name, save_every=1) for name in ("unbroken", "stopped"))
    assert run_train(unbroken) == 0
    stop_after(3, stopped)
    assert run_train(stopped) == 0
    for key in ("model", "optimizer", "step"):
        assert_same(newest(tmp_path / "stopped")[key], newest(tmp_path / "unbroken")[key])
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken")


def sequences(folder: Path, split: str, token_ids=range(96)) -> train_gpt2.Sequences:
    """The sequences of write_shards(), for TINY."""
    return train_gpt2.Sequences(str(folder), split, TINY.block_size, token_ids)


def losses(out_dir) -> dict[int, float]:
    """The logged training losses of a run, by step."""
    return {step: entry["loss"] for step, entry in read_log(Path(out_dir) / "log.jsonl")["train"].items()}


def newest(out_dir) -> dict:
    """The newest checkpoint of a run."""
    return checkpoint.read(checkpoint.find(out_dir)[-1])


def assert_same(a, b) -> None:
    """Two nested structures are equal, their tensors bit by bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A randomly initialised GPT-2 of `transformers`, and the folder it was saved to."""
    torch.manual_seed(0)
    config = GPT2Config(n_positions=64, n_embd=48, n_layer=3, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases and LayerNorms that are not 0 and 1, logits far from uniform
        theirs.transformer.ln_f.bias.add_(1.0)
    folder = tmp_path_factory.mktemp("pretrained") / "hf"
    theirs.save_pretrained(folder)
    return theirs, folder


COMMIT = "0123456789abcdef" * 2 + "01234567"
API = re.compile(r"/api/datasets/([^/]+/[^/]+)/(revision|tree)/(refs/convert/parquet|\w+)/?(.*)")
ROUTE = re.compile(r"/(?:datasets/)?(?P<repo>[\w.-]+(?:/[\w.-]+)?)/resolve/(?P<revision>\w+)/(?P<path>.+)")


class Hub(ThreadingHTTPServer):
    """Serves datasets, {"owner/name": {"path": bytes}}, and files of models as the Hugging Face Hub does.

    `fault` is called with each request to a file, and may answer it by itself, in which case it returns True;
    `before_answer` likewise with each other request; `before_listing` is called before the list of files is given.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.datasets: dict[str, dict[str, bytes]] = {}
        self.fault = self.before_answer = lambda request, path: False
        self.before_listing = lambda: None
        self.asked = Counter()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """A client that goes away is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content: bytes, status: int = 200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        self.server.asked[self.command, path] += 1
        if path.startswith("/api/") and self.server.before_answer(self, path):
            return
        if match := API.fullmatch(path):
            dataset, what, revision, folder = match.groups()
            files = self.server.datasets.get(dataset)
            if files is None or revision not in (
                ["main", "refs/convert/parquet", COMMIT] if what == "revision" else [COMMIT]
            ):
                code = "RepoNotFound" if files is None else "RevisionNotFound"
                self.answer(b"{}", 404, X_Error_Code=code, X_Error_Message="no such thing")
            elif what == "revision":
                self.answer(json.dumps({"id": dataset, "sha": COMMIT, "siblings": []}).encode())
            else:
                self.server.before_listing()
                found = [name for name in files if name.startswith(f"{folder}/" if folder else "")]
                if folder and not found:
                    self.answer(b"{}", 404, X_Error_Code="EntryNotFound")
                    return
                entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in found]
                entries += [{"type": "directory", "path": "sample", "oid": "0"}]
                self.answer(json.dumps(entries).encode())
        elif match := ROUTE.fullmatch(path):
            name = match["path"]
            content = self.server.datasets.get(match["repo"], {}).get(name)
            if self.server.fault(self, name):
                return
            if content is None:
                self.answer(b"", 404, X_Error_Code="EntryNotFound")
                return
            commit = match["revision"] if len(match["revision"]) == 40 else COMMIT
            headers = {"ETag": f'"{hash(content) & 0xFFFFFFFF:08x}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
            if self.command == "GET" and (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))):
                start = int(asked[1])
                headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.answer(content[start:], 206, **headers)
            else:
                self.answer(content, **headers)
        else:
            self.answer(b"", 404)


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def environment(hub, tmp_path) -> dict:
    """Variables that send the Hub's client to a server, or to an address, with a cache of its own."""
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "5"}
    return home | {"HF_ENDPOINT": hub.address if isinstance(hub, Hub) else hub}
