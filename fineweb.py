"""Turn text into the shards that train_gpt2.py reads.

    python fineweb.py                           # edu_fineweb10B/: FineWeb-Edu, 10B tokens, from the Hugging Face Hub
    python fineweb.py --max_tokens 500000000    # its first 500M tokens
    python fineweb.py --dataset my_texts        # a folder of .parquet, .jsonl, .jsonl.gz or .txt files
    python fineweb.py --demo                    # demo_data/: prose that comes with Python, no network

A shard is a 1-D uint16 array of GPT-2 tokens in a .npy file: PREFIX_val_000000.npy first, then PREFIX_train_000001.npy
and so on. Documents follow each other, each one opened by <|endoftext|>, and run on from one shard into the next. In
parquet and JSON lines a document is the field "text" of a row; a .txt file is one document. manifest.json tells what
the shards were made from and what is in them. The same command again goes on after the last shard.
"""

import ast
import dataclasses
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.cli import Parser, UserError, exit_status, one_line
from support.files import DAMAGE, prefetch, read_plain, whole_file, whole_folder
from support.tokens import (
    END_OF_TEXT,
    N_VOCAB,
    RANKS_SHA256,
    encode_document,
    open_shard,
    tokenizer,
)

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
SAMPLED = (FINEWEB_EDU, "HuggingFaceFW/fineweb")  # which have a folder sample/10BT
DEMO_DIR = "demo_data"
AGAIN = "complete shards are kept, and the same command again goes on after them"


# ---------------------------------------------------------------- tokens

BATCH_CHARACTERS = 1_000_000  # what a worker gets at once: some 30 ms of work

Batch = tuple[list[int], float, list[str]]  # file and row of the first text, fraction of the dataset read, the texts


def fast_tokenizer(**kwargs):
    """The GPT-2 encoding as a GPT2Tokenizer of `transformers`, which takes <|endoftext|> in a text for that token."""
    from transformers import GPT2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ranks = {tokenizer().decode_single_token_bytes(rank): rank for rank in range(END_OF_TEXT)}
    letters = bytes_to_unicode()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:  # encoded until two parts are left, which are those that its merge joins
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, N_VOCAB) for a, b in pairwise(parts)]
            first = joined.index(min(joined))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append((names[parts[0]], names[parts[1]]))
    vocabulary = {names[token]: rank for token, rank in ranks.items()} | {"<|endoftext|>": END_OF_TEXT}
    return GPT2Tokenizer(vocab=vocabulary, merges=merges, **kwargs)


def encode_batch(batch: Batch) -> tuple[list[int], float, np.ndarray]:
    """A batch with its texts replaced by their tokens, (N,) uint16."""
    place, fraction, texts = batch
    text = "".join(f"<|endoftext|>{text}" for text in texts)
    if text.count("<|endoftext|>") == len(texts):
        with suppress(ValueError):  # the same tokens by one call, in which Python's lock is free
            return place, fraction, tokenizer().encode_to_numpy(text, allowed_special="all").astype(np.uint16)
    return place, fraction, np.concatenate([encode_document(text) for text in texts])


def encode_batches(batches: Iterable[Batch], workers: int) -> Iterator[tuple]:
    """encode_batch() of each batch, in order; with more than one worker in threads."""
    if workers == 1:
        yield from map(encode_batch, batches)
        return
    tokenizer()  # made once, not by each of them
    pool = ThreadPoolExecutor(workers)
    try:
        # Enough in advance to keep them busy while a shard is written.
        yield from prefetch(encode_batch, batches, 2 * workers + 30, pool.submit)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------- shards and their manifest

SHARD = re.compile(r"[\w.-]*_(train|val)_\d+\.(npy|bin)", re.ASCII)


def pieces(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """A shard in pieces that are small enough to work on in memory."""
    return (tokens[start : start + 2**20] for start in range(0, len(tokens), 2**20))


@dataclass
class Manifest:
    """manifest.json: from what and how the shards beside it were made, and what is in them."""

    dataset: str
    subset: str
    revision: str
    shard_tokens: int
    max_tokens: int | None
    tokenizer: str = RANKS_SHA256
    prefix: str = ""  # of the shards' names
    commit: str | None = None  # what the Hub resolved the revision to; None for a folder
    files: dict = field(default_factory=dict)  # of the dataset, in the order they are read, with their bytes
    complete: bool = False
    # Where the next shard begins: [file, row, skip] is `skip` tokens on from the start of that row of that file.
    resume_at: list = field(default_factory=lambda: [0, 0, 0])
    documents: int = 0
    shards: list = field(default_factory=list)  # {"name", "tokens", "sha256"} of each
    token_ids: list = field(default_factory=list)  # those that occur

    def __post_init__(self):
        name = re.sub(r"[^a-zA-Z0-9.]+", "-", Path(self.dataset).resolve().name).strip("-.") or "text"
        self.prefix = self.prefix or ("edufineweb" if self.dataset == FINEWEB_EDU else name)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """The manifest of a folder; UserError if it is missing or damaged."""
        path = folder / "manifest.json"
        try:
            manifest = cls(**json.loads(read_plain(path)))
            numbers = [*manifest.resume_at, *manifest.token_ids, *manifest.files.values()]
            numbers += [shard["tokens"] for shard in manifest.shards]
            if not (
                all(isinstance(getattr(manifest, f.name), f.type) for f in dataclasses.fields(cls))
                and all(type(number) is int and number >= 0 for number in numbers)
                and all(SHARD.fullmatch(shard["name"]) for shard in manifest.shards)
                and not any(name.startswith("/") or ".." in Path(name).parts for name in manifest.files)
                and len(manifest.resume_at) == 3
                and manifest.resume_at[0] <= len(manifest.files)
                and max(manifest.token_ids, default=0) < N_VOCAB
                and re.fullmatch(r"[\w.-]+", manifest.prefix)
            ):
                raise ValueError("an entry has a value that it cannot have")
        except DAMAGE as error:
            mend = f"restore it, or delete {folder} and start again"
            raise UserError(f"cannot read {path}: {one_line(error)}: {mend}") from None
        return manifest

    def check_sizes(self, folder: Path) -> None:
        """Raise UserError unless its shards are in the folder, with as many tokens; what these are is not looked at."""
        for shard in self.shards:
            if len(open_shard(path := folder / shard["name"])) != shard["tokens"]:
                raise UserError(f"{path} is not what manifest.json says: delete {folder} and start again")

    def save(self, folder: Path) -> None:
        """Replace manifest.json, whole or not at all, with a line for each field."""
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in dataclasses.asdict(self).items())
        with whole_file(folder / "manifest.json") as file:
            file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())

    def add(self, path: Path, resume_at: list[int], complete: bool) -> None:
        """Enter a shard as it is on the disk, and where the next one begins; UserError if it is not one of GPT-2."""
        tokens, seen = open_shard(path), np.zeros(2**16, dtype=bool)
        seen[self.token_ids] = True
        for piece in pieces(tokens):
            seen[piece] = True
            self.documents += int(np.count_nonzero(piece == END_OF_TEXT))
        self.token_ids = np.flatnonzero(seen).tolist()
        if seen[N_VOCAB:].any():
            raise UserError(f"{path} holds token {self.token_ids[-1]}, which GPT-2 does not have: replace the file")
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.shards.append({"name": path.name, "tokens": len(tokens), "sha256": digest})
        self.resume_at, self.complete = resume_at, complete

    @property
    def tokens(self) -> int:
        """How many all shards hold."""
        return sum(shard["tokens"] for shard in self.shards)

    def shard_name(self, number: int) -> str:
        """What a shard made here is called, counted from 0."""
        return f"{self.prefix}_{'train' if number else 'val'}_{number:06d}.npy"


def enter_shard(path: Path, folder: Path, manifest: Manifest, resume_at: list, complete: bool) -> None:
    """Enter a shard in the manifest, and move it beside that; where no terminal shows a bar, say so in a line."""
    manifest.add(path, resume_at, complete)
    path.replace(folder / path.name)
    manifest.save(folder)
    if manifest.files and not sys.stderr.isatty():
        print(f"{path.name}: {manifest.tokens:,} tokens so far", file=sys.stderr, flush=True)


def write_shard(tokens: np.ndarray, folder: Path, manifest: Manifest, resume_at: list, complete: bool = False) -> None:
    """Write the next shard, then the manifest; a run that is killed between the two writes the same shard again."""
    path = folder / manifest.shard_name(len(manifest.shards))
    with whole_file(path) as file:
        # The same bytes as np.save(), which would hide that the disk is full.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(tokens))
        file.write(tokens.data)
    enter_shard(path, folder, manifest, resume_at, complete)


def find_token_ids(paths: list[Path]) -> list[int]:
    """The ids that occur in the shards of one folder, in ascending order.

    They come from manifest.json if it is about these very shards. Else they are counted, and kept in token_ids.json
    until a shard changes.
    """
    folder, sizes = paths[0].parent, {path.name: len(open_shard(path)) for path in paths}
    with suppress(UserError):
        manifest = Manifest.load(folder)
        if {shard["name"]: shard["tokens"] for shard in manifest.shards} == sizes:
            return manifest.token_ids
    cache = folder / "token_ids.json"
    known = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
    with suppress(*DAMAGE):
        cached = json.loads(read_plain(cache))
        if cached["shards"] == known and all(type(i) is int and 0 <= i < 2**16 for i in cached["token_ids"]):
            return cached["token_ids"]
    seen = np.zeros(2**16, dtype=bool)
    with tqdm(total=sum(sizes.values()), desc="which tokens occur", unit="tok", unit_scale=True, disable=None) as bar:
        for path in paths:
            for piece in pieces(open_shard(path)):
                seen[piece] = True
                bar.update(len(piece))
    token_ids = np.flatnonzero(seen).tolist()
    with suppress(OSError), whole_file(cache) as file:  # it is no harm if the folder can't be written
        file.write(json.dumps({"shards": known, "token_ids": token_ids}).encode())
    return token_ids


def show_progress(encoded: Iterable[tuple], manifest: Manifest) -> Iterator[tuple]:
    """Hand on places and tokens; on a terminal, show in a bar how far they are."""
    quiet = None if manifest.files else True  # None is tqdm's way to say: unless it is a terminal
    with tqdm(initial=manifest.tokens, unit="tok", unit_scale=True, disable=quiet, dynamic_ncols=True) as bar:
        bar.set_description_str("waiting for text")
        for place, fraction, tokens in encoded:
            yield place, tokens
            now = bar.n + len(tokens)
            bar.total = min(manifest.max_tokens or sys.maxsize, round(now / max(fraction, 1e-9)))
            bar.set_description_str(manifest.shard_name(now // manifest.shard_tokens), refresh=False)
            bar.update(len(tokens))


def write_shards(batches: Iterable[Batch], folder: Path, manifest: Manifest, workers: int = 1) -> None:
    """Tokenize batches, which begin with the row of manifest.resume_at, into shards, until their end or max_tokens.

    Raises UserError if there is too little text for any, OSError if one can't be written.
    """
    buffer, filled = np.empty(manifest.shard_tokens, dtype=np.uint16), 0
    to_skip, to_take = manifest.resume_at[2], (manifest.max_tokens or sys.maxsize) - manifest.tokens
    with closing(encode_batches(batches, workers)) as encoded:
        for (file, row), tokens in show_progress(encoded, manifest):
            at = min(to_skip, len(tokens))  # how much of `tokens` is done with
            to_skip -= at
            while at < len(tokens) and to_take:
                if filled == len(buffer):
                    write_shard(buffer, folder, manifest, [file, row, at])
                    filled = 0
                taken = min(len(tokens) - at, len(buffer) - filled, to_take)
                buffer[filled : filled + taken] = tokens[at : at + taken]
                at, filled, to_take = at + taken, filled + taken, to_take - taken
            if not to_take:
                break
    begin = 0 if manifest.shards else max(1, filled // 10)  # of what fills no more than one, a tenth
    if begin >= filled:
        raise UserError(f"{manifest.dataset} has too little text, or less than it had")
    if begin:
        write_shard(buffer[:begin], folder, manifest, [0, 0, begin])  # so many tokens from the start of the dataset
    write_shard(buffer[begin:filled], folder, manifest, manifest.resume_at, complete=True)


# ---------------------------------------------------------------- sources: a folder, or a dataset on the Hub


def read_rows(path: Path, columns: tuple[str, ...] = ("text",)) -> Iterator[tuple[dict | None, float]]:
    """The rows of a .parquet, .jsonl(.gz) or .txt file, None for an empty line, with the fraction read so far.

    Of a parquet file only the columns, all of which it must have. Raises what its reader does, some of DAMAGE.
    """
    if path.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            if lacking := [name for name in columns if name not in file.schema_arrow.names]:
                raise ValueError(f"no column named {lacking[0]}, only {', '.join(file.schema_arrow.names)}")
            batches = file.iter_batches(64, columns=columns)
            for row, record in enumerate((record for batch in batches for record in batch.to_pylist()), 1):
                yield record, row / file.metadata.num_rows
    elif path.suffix == ".txt":
        yield {"text": path.read_bytes().decode()}, 1.0
    else:
        size = path.stat().st_size
        with open(path, "rb") as file, gzip.open(file) if path.suffix == ".gz" else nullcontext(file) as lines:
            for line in lines:
                yield json.loads(line) if line.strip() else None, file.tell() / size


def read_batches(paths: Iterable[Path], manifest: Manifest) -> Iterator[Batch]:
    """The texts from the row of manifest.resume_at on, by about BATCH_CHARACTERS; UserError for what can't be read."""
    begin, first, _ = manifest.resume_at
    sizes = [*manifest.files.values()]
    total, before = sum(sizes) + 1, sum(sizes[:begin]) + 1  # never 0
    place, texts, characters = [begin, first], [], 0
    for number, path in enumerate(paths, begin):
        row = first
        try:
            for record, fraction in islice(read_rows(path), first, None):
                if not isinstance(text := None if record is None else record["text"], str | None):
                    raise ValueError(f"text is {type(text).__name__}, not a string")
                if text is not None:  # null is no document
                    texts.append(text)
                    characters += len(text) + 1
                row += 1
                if characters >= BATCH_CHARACTERS:
                    yield place, (before + fraction * sizes[number]) / total, texts
                    place, texts, characters = [number, row], [], 0
        except DAMAGE as error:
            mend = "delete it if it was downloaded, and run the same command again; else mend it and start again"
            raise UserError(f"cannot read {path}, row {row}: {one_line(error)}: {mend}") from None
        before, first = before + sizes[number], 0
        if texts and (manifest.commit or number == len(sizes) - 1):  # don't keep texts waiting for a download
            yield place, before / total, texts
            place, texts, characters = [number + 1, 0], [], 0


HUB_MEND = f"check the network, --dataset, --subset and --revision; {AGAIN}"


def ask_hub(function: Callable, *args, tries: int = 3, mend: str = HUB_MEND, **kwargs):
    """function(...) of huggingface_hub, tried so many times; UserError, which ends in `mend`, if it fails for good."""
    for left in reversed(range(tries)):
        try:
            return function(*args, **kwargs)
        except Exception as error:  # the client's, the network library's and hf_xet's own
            if isinstance(error, OSError) and error.errno:  # of the disk
                raise
            if not left:
                raise UserError(f"the Hub: {one_line(error)}: {mend}") from None
            time.sleep(1)


def find_source(manifest: Manifest) -> None:
    """Enter in a new manifest the files to read, and the commit if they are on the Hub; UserError if there are none."""
    place, names, tokens = Path(manifest.dataset, manifest.subset), [], 0
    if Path(manifest.dataset).is_dir():
        suffixes = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
        files = {path.name: path.stat().st_size for path in place.glob("[!.]*") if path.is_file()}
    elif not re.fullmatch(r"\w[\w.-]*/[\w.-]+", manifest.dataset):
        raise UserError(f"there is no folder {manifest.dataset} (on the Hub, a dataset would be OWNER/NAME)")
    else:
        from huggingface_hub import HfApi

        suffixes, hub = (".parquet",), HfApi()
        manifest.commit = ask_hub(hub.dataset_info, manifest.dataset, revision=manifest.revision).sha
        tree = partial(hub.list_repo_tree, repo_type="dataset", revision=manifest.commit, recursive=True)
        entries = ask_hub(lambda: list(tree(manifest.dataset, manifest.subset or None)))
        files = {entry.path: entry.size for entry in entries if hasattr(entry, "size")}
        # Ready-made shards, those for validation first, as many as max_tokens takes; there are two bytes in a token.
        shards = [name for name in files if name.endswith(".bin") and SHARD.fullmatch(Path(name).name)]
        for name in sorted(shards, key=lambda name: ("_val_" not in name, name)):
            if tokens < (manifest.max_tokens or sys.maxsize) or "_train_" not in names[-1]:
                names.append(name)
                tokens += files[name] // 2 - 512
        if len({Path(name).name for name in names}) < len(names):
            raise UserError(f"several shards in {place} have the same name: choose a folder of it with --subset")
    names = names or sorted(name for name in files if name.endswith(suffixes))
    if not names:
        raise UserError(f"no {', '.join(suffixes)} files in {place}: check --dataset and --subset")
    manifest.files = {name: files[name] for name in names}


def fetch_files(manifest: Manifest, downloads: Path, keep: bool) -> Iterator[Path]:
    """The files from manifest.resume_at on; the Hub's are fetched one ahead, and deleted after use unless kept."""
    names = [*manifest.files]
    done, left = names[: manifest.resume_at[0]], names[manifest.resume_at[0] :]
    if manifest.commit is None:
        yield from (Path(manifest.dataset, manifest.subset, name) for name in left)
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    if downloads.is_symlink():
        raise UserError(f"{downloads} is a link, which may lead anywhere: remove it")
    disable_progress_bars()
    warnings.filterwarnings("ignore", "Not enough free disk space")  # it is an error soon enough
    for path in [*downloads.rglob("*.incomplete"), *(downloads / name for name in done)]:  # a killed run left them
        path.unlink(missing_ok=True)
    folder = None if keep else downloads  # None is the Hub's own cache
    download = partial(hf_hub_download, repo_type="dataset", revision=manifest.commit, local_dir=folder)
    for path in map(Path, prefetch(partial(ask_hub, download, manifest.dataset), left, ahead=1)):
        yield path
        if not keep:
            path.unlink(missing_ok=True)


def take_shards(paths: Iterable[Path], folder: Path, manifest: Manifest) -> None:
    """Check ready-made shards and move them into the folder."""
    begin, end = manifest.resume_at[0], len(manifest.files)
    for number, path in enumerate(tqdm(paths, initial=begin, total=end, unit="shard", disable=None), begin + 1):
        enter_shard(path, folder, manifest, [number, 0, 0], number == end)


# ---------------------------------------------------------------- the whole job


def find_manifest(folder: Path, wanted: Manifest) -> Manifest | None:
    """The manifest of a folder, None if it has no shards; UserError if their settings differ, or some are missing."""
    if not (folder / "manifest.json").exists():
        if any(SHARD.fullmatch(path.name) for path in folder.glob("*")):
            raise UserError(f"{folder} holds shards, but no manifest.json to go on from: give another --out_dir")
        return None
    manifest = Manifest.load(folder)
    for name in ("dataset", "subset", "revision", "shard_tokens", "max_tokens", "tokenizer"):
        if (was := getattr(manifest, name)) != (now := getattr(wanted, name)):
            raise UserError(f"{folder} has shards with {name} {was}, not {now}: give another --out_dir")
    manifest.check_sizes(folder)
    return manifest if manifest.shards else None


def check_folder(folder: Path) -> None:
    """Raise UserError if a folder has a manifest.json, and the shards beside it are not all there."""
    if (folder / "manifest.json").exists():
        manifest = Manifest.load(folder)
        manifest.check_sizes(folder)
        if not manifest.complete:
            raise UserError(f"{folder} lacks shards: run the `python fineweb.py` command that began it again")


def build(folder: Path, wanted: Manifest, workers: int = 1, keep_downloads: bool = False) -> Manifest:
    """Make the shards with the wanted settings, or go on making them; whatever happens, complete shards stay.

    Raises UserError for whatever the user can mend.
    """
    from filelock import FileLock, Timeout

    downloads, lock = folder / ".fineweb_downloads", folder / ".fineweb_lock"
    try:
        manifest = find_manifest(folder, wanted)
        if manifest and manifest.complete and not lock.exists():
            return manifest
        if not manifest or not (manifest.commit or manifest.complete):
            find_source(wanted)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, blocking=False):
            manifest = find_manifest(folder, wanted) or wanted  # another process may just have made it
            if wanted.files and wanted.files != manifest.files:
                raise UserError(f"the files in {wanted.dataset} are not those of the start: give another --out_dir")
            if not manifest.complete:
                size, at = sum(manifest.files.values()) / 1e9, f" at {manifest.commit}" if manifest.commit else ""
                print(f"{manifest.dataset}{at}: {len(manifest.files)} files, {size:.2f} GB", file=sys.stderr)
                manifest.save(folder)
                ready_made = any(name.endswith(".bin") for name in manifest.files)
                paths = fetch_files(manifest, downloads, keep_downloads and not ready_made)
                if ready_made:
                    take_shards(paths, folder, manifest)
                else:
                    write_shards(read_batches(paths, manifest), folder, manifest, workers)
            shutil.rmtree(downloads, ignore_errors=True)
            lock.unlink()
    except Timeout:
        raise UserError(f"another fineweb.py is at work in {folder}: wait until it has finished") from None
    except OSError as error:
        raise UserError(f"{one_line(error)}; {AGAIN}") from None
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
        raise UserError(f"interrupted; {AGAIN}", status=130) from None
    return manifest


def verify(folder: Path) -> Manifest:
    """The manifest of a folder; UserError unless it is complete, and the shards byte by byte what it says."""
    manifest, faults = Manifest.load(folder), []
    found = dataclasses.replace(manifest, documents=0, shards=[], token_ids=[])
    for shard in tqdm(manifest.shards, unit="shard", disable=None):
        found.add(folder / shard["name"], manifest.resume_at, manifest.complete)
        if found.shards[-1] != shard:
            faults.append(f"{shard['name']} is another")
    if not faults and found != manifest:
        faults.append("documents or token_ids differ")
    names = {shard["name"] for shard in manifest.shards}
    faults += [f"{p.name} is not in it" for p in folder.glob("*") if SHARD.fullmatch(p.name) and p.name not in names]
    if faults:
        raise UserError(f"{folder / 'manifest.json'} is not about these shards: {', '.join(faults)}")
    if not manifest.complete:
        raise UserError(f"the shards in {folder} are right, but not complete: run the command that began them again")
    return manifest


# ---------------------------------------------------------------- the demo corpus


def demo_documents() -> list[str]:
    """Prose that comes with every Python, by the page, in a random order, always the same: about 370,000 tokens."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]  # the language reference, which `help("for")` shows
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with warnings.catch_warnings(action="ignore"):  # escape sequences in other people's strings
            tree = ast.parse(path.read_bytes())  # never imported
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
        docstrings = (ast.get_docstring(node) or "" for node in nodes)
        texts += [text for text in docstrings if len(text) >= 100]
    # A page ends with the first blank line after 1,500 characters.
    documents = [page for text in texts for page in re.findall(r"(?s).{1500,}?\n\n|.+", text)]
    random.Random(0).shuffle(documents)
    return documents


def write_demo(out_dir: Path) -> None:
    """Write the demo corpus as shards of 40,000 tokens, the folder all at once, unless there are shards in it."""
    if any(out_dir.glob("*_train_*")):
        return
    if out_dir.exists():
        raise UserError(f"{out_dir} is there already and holds no shards: remove it, or name another folder")
    try:
        with whole_folder(out_dir) as folder:
            manifest = Manifest("demo", "", "", shard_tokens=40_000, max_tokens=None)
            write_shards([([0, 0], 1.0, demo_documents())], folder, manifest)
    except FileExistsError:  # another process was faster
        write_demo(out_dir)


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = Parser(prog="fineweb.py", description=__doc__)
    add, switch = partial(parser.add_argument, metavar="X"), partial(parser.add_argument, action="store_true")
    add("--out_dir", help="folder for the shards (default: edu_fineweb10B, or demo_data with --demo)")
    add("--dataset", default=FINEWEB_EDU, help="name on the Hub, or a folder (default: %(default)s)")
    add("--subset", help="folder in the dataset (default: sample/10BT of FineWeb and FineWeb-Edu, else all)")
    add("--revision", default="main", help="branch, tag or commit on the Hub (default: %(default)s)")
    add("--shard_tokens", type=int, default=100_000_000, help="tokens in a shard (default: 100 million)")
    add("--max_tokens", type=int, help="stop after so many tokens (default: take all)")
    add("--workers", type=int, default=cores, help="threads that tokenize (default: the %(default)s usable cores)")
    switch("--keep_downloads", help="keep the downloads, in the Hub's own cache (else two at a time are on the disk)")
    switch("--demo", help="write the demo corpus, which needs no network")
    switch("--verify", help="compare the shards in --out_dir with their manifest.json")
    args = parser.parse_args(argv)
    for name, least, most in [("shard_tokens", 1, 2**30), ("max_tokens", 2, 2**53), ("workers", 1, 1024)]:
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name} {value} must be from {least} to {most}")
    for name in ("out_dir", "dataset"):
        if getattr(args, name) == "":
            parser.error(f"--{name} is empty")
    if args.demo:
        for name in ("dataset", "subset", "revision", "shard_tokens", "max_tokens", "keep_downloads"):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--demo takes no --{name}")
    subset = args.subset if args.subset is not None else "sample/10BT" if args.dataset in SAMPLED else ""
    folder = Path(args.out_dir or (DEMO_DIR if args.demo else "edu_fineweb10B"))
    if args.verify:
        manifest = verify(folder)
    elif args.demo:
        write_demo(folder)
        print(f"the demo corpus is in {folder}", file=sys.stderr)
        return
    else:
        dataset = os.path.normpath(args.dataset) if os.path.isdir(args.dataset) else args.dataset
        wanted = Manifest(dataset, subset.strip("/"), args.revision, args.shard_tokens, args.max_tokens)
        manifest = build(folder, wanted, args.workers, args.keep_downloads)
    shards = f"{len(manifest.shards)} shards (a short last one is normal)"
    print(f"{folder}: {shards}, {manifest.tokens:,} tokens, {manifest.documents:,} documents", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(exit_status(main, "fineweb.py"))
