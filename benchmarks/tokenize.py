"""How fast fineweb.py tokenizes, beside one process and beside the usual pool, on the same text in one run.

    python benchmarks/tokenize.py             # tokens/s, medians of interleaved runs
    python benchmarks/tokenize.py --memory    # peak memory of all processes together, with shards of 100M tokens

The text is the demo corpus, over and over, as documents of the length that FineWeb-Edu's have on average (4,700
characters), in one Snappy-compressed parquet file with row groups of 1,000.

- single: one process, encode_ordinary() of each document in memory.
- imap: the usual script. multiprocessing's Pool(2).imap(..., chunksize=16) over single documents read from the parquet
  file, each encoded into a list, checked, cast to uint16, and copied into shards that np.save() writes. Its processes
  are forks that find the encoder built.
- fineweb: fineweb.build() with two workers, which are threads, from the parquet file to shards and manifest, with
  checksums.

The first two come with the pattern that tiktoken ships and with that of fineweb.py, which gives the same tokens. All
that write shards must write the same tokens.
"""

# ruff: noqa: E402

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, where Python would find its own "tokenize"

import argparse
import contextlib
import multiprocessing
import statistics
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import tiktoken

import fineweb
from support.tokens import END_OF_TEXT, tokenizer

WORKERS = 2


def write_text(megabytes: float, folder: Path) -> list[str]:
    """Documents of about 4,700 characters, of the demo corpus, over and over; also as a parquet file in the folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pages, texts, length = fineweb.demo_documents(), [""], 0
    while length < 1e6 * megabytes:
        for page in pages:
            texts[-1] += page
            length += len(page)
            if len(texts[-1]) >= 4000:
                texts.append("")
    folder.mkdir()
    pq.write_table(pa.table({"text": texts}), folder / "000_00000.parquet", row_group_size=1000)
    return texts


@cache
def shipped() -> tiktoken.Encoding:
    """GPT-2's encoding with the pattern that tiktoken ships."""
    from tiktoken_ext.openai_public import r50k_pat_str

    ours = tokenizer()
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ours._mergeable_ranks, special_tokens=ours._special_tokens
    )


def single(texts: list[str], encoding: tiktoken.Encoding) -> int:
    return sum(len(encoding.encode_ordinary(text)) for text in texts)


def encode_checked(text: str, encoding: Callable[[], tiktoken.Encoding]) -> np.ndarray:
    tokens = np.array([END_OF_TEXT, *encoding().encode_ordinary(text)])
    assert (tokens >= 0).all()
    assert (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def imap(text: Path, folder: Path, shard_tokens: int, encoding: Callable[[], tiktoken.Encoding]) -> int:
    from pyarrow.parquet import ParquetFile

    encoding()
    file = ParquetFile(text / "000_00000.parquet")
    texts = (text for batch in file.iter_batches(1024) for text in batch["text"].to_pylist())
    shard, filled, number = np.empty(shard_tokens, dtype=np.uint16), 0, 0
    with multiprocessing.get_context("fork").Pool(WORKERS) as pool:
        for tokens in pool.imap(partial(encode_checked, encoding=encoding), texts, chunksize=16):
            while len(tokens):
                taken = min(len(tokens), shard_tokens - filled)
                shard[filled : filled + taken] = tokens[:taken]
                tokens, filled = tokens[taken:], filled + taken
                if filled == shard_tokens:
                    np.save(folder / f"text_train_{number:06d}.npy", shard)
                    filled, number = 0, number + 1
    np.save(folder / f"text_train_{number:06d}.npy", shard[:filled])
    return number * shard_tokens + filled


def ours(text: Path, folder: Path, shard_tokens: int) -> int:
    wanted = fineweb.Manifest(str(text), "", "main", shard_tokens, None)
    return fineweb.build(folder, wanted, WORKERS).tokens


def checksum(folder: Path) -> int:
    """Of the tokens in a folder's shards, in order."""
    value = 0
    for path in sorted(folder.glob("*.npy"), key=lambda path: path.name[-10:]):
        value = zlib.crc32(np.load(path), value)
    return value


def speed(megabytes: float, rounds: int, shard_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch, "text")
        texts = write_text(megabytes, text)
        sides = {
            "single, tiktoken's pattern": lambda folder: single(texts, shipped()),
            "single, fineweb.py's pattern": lambda folder: single(texts, tokenizer()),
            "imap, 2 workers, tiktoken's pattern": lambda folder: imap(text, folder, shard_tokens, shipped),
            "imap, 2 workers, fineweb.py's pattern": lambda folder: imap(text, folder, shard_tokens, tokenizer),
            "fineweb, 2 workers": lambda folder: ours(text, folder, shard_tokens),
        }
        rates, checksums = {name: [] for name in sides}, set()
        order = list(sides)
        for _ in range(rounds):
            for name in order:
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    began = time.perf_counter()
                    tokens = sides[name](Path(folder))
                    rates[name].append(tokens / (time.perf_counter() - began))
                    if not name.startswith("single"):
                        checksums.add(checksum(Path(folder)))
            order = [*order[1:], order[0]]
    assert len(checksums) == 1, "the shards differ"
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = medians["fineweb, 2 workers"]
    print(f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.0f} MB; {rounds} rounds")
    print("| side | million tokens/s, median (least to most) | fineweb, as a multiple of it |\n|---|---|---|")
    for name, values in rates.items():
        span = f"{min(values) / 1e6:.2f} to {max(values) / 1e6:.2f}"
        print(f"| {name} | {medians[name] / 1e6:.2f} ({span}) | {best / medians[name]:.2f} |")


def processes(root: int) -> list[int]:
    """A process and its children, and theirs."""
    found = [root]
    with contextlib.suppress(OSError):  # it has just ended
        for task in Path(f"/proc/{root}/task").glob("*/children"):
            found += [pid for child in task.read_text().split() for pid in processes(int(child))]
    return found


def memory(megabytes: float) -> None:
    """Proportional set size (what is shared counts once), summed over all processes, every 50 ms; Linux only."""
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch, "text")
        write_text(megabytes, text)
        script = [sys.executable, fineweb.__file__, "--dataset", str(text), "--out_dir", f"{scratch}/shards"]
        run = subprocess.Popen([*script, "--workers", str(WORKERS)])
        peak = 0
        while run.poll() is None:
            total = 0
            for pid in processes(run.pid):
                with contextlib.suppress(OSError):
                    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                    total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            peak = max(peak, total)
            time.sleep(0.05)
    assert run.returncode == 0
    print(f"peak memory of all processes together: {peak * 1024 / 1e9:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megabytes", type=float, help="of text (default: 200; 1,100 for --memory, which fills three shards)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    if args.memory:
        memory(args.megabytes or 1100)
    else:
        speed(args.megabytes or 200, args.rounds, shard_tokens=20_000_000)


if __name__ == "__main__":
    main()
