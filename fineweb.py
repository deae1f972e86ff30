"""Turn text into the shards that train_gpt2.py reads.

    python fineweb.py                           # FineWeb-Edu, 10B tokens, into edu_fineweb10B/
    python fineweb.py --max_tokens 500000000    # its first 500M tokens
    python fineweb.py --dataset my_texts        # a folder of .parquet, .jsonl(.gz) or .txt
    python fineweb.py --demo                    # prose that comes with Python, into demo_data/

A shard is a 1-D uint16 array of GPT-2 tokens in a .npy file: PREFIX_val_000000.npy first, then
PREFIX_train_000001.npy and so on. Documents follow each other, each opened by <|endoftext|>, across
shards. In parquet and JSON lines a document is the field "text" of a row (or --text_column); a .txt
file is one, or several between lines that are just <|endoftext|>. manifest.json says what the
shards were made from. The same command resumes after the last shard.
"""

import ast
import codecs
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
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from support.cli import Parser, UserError, one_line, run_script
from support.files import DAMAGE, prefetch, whole_file, whole_folder
from support.tokens import END_OF_TEXT, N_VOCAB, RANKS_SHA256, encode_document, find_shards, open_shard, tokenizer

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
DEMO_DIR = "demo_data"
AGAIN = "complete shards are kept, and the same command again resumes after them"

# ---------------------------------------------------------------- tokens

BATCH_CHARACTERS = 1_000_000  # what a worker gets at once: some 30 ms of work


class Place(NamedTuple):
    """A place in the dataset: `skip` tokens on from the start of a row of a file."""

    file: int
    row: int
    skip: int = 0


class Batch(NamedTuple):
    """Some documents, or their tokens (N,) uint16 with an <|endoftext|> before each."""

    place: Place  # of the first
    fraction: float  # of the dataset, up to the end of the last
    content: list[str] | np.ndarray


def encode_batch(batch: Batch) -> Batch:
    """The batch with its documents replaced by their tokens."""
    text = "".join(f"<|endoftext|>{text}" for text in batch.content)
    if text.count("<|endoftext|>") == len(batch.content):
        with suppress(ValueError):  # the same tokens by one call, in which Python's lock is free
            tokens = tokenizer().encode_to_numpy(text, allowed_special="all")
            return batch._replace(content=tokens.astype(np.uint16))
    return batch._replace(content=np.concatenate([encode_document(text) for text in batch.content]))


def encode_batches(batches: Iterable[Batch], workers: int) -> Iterator[Batch]:
    """encode_batch() of each batch, in order, by threads."""
    tokenizer()  # made once, not by each of them
    pool = ThreadPoolExecutor(workers)
    try:
        # Enough in advance to keep them busy while a shard is written.
        yield from prefetch(encode_batch, batches, 2 * workers + 30, pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ---------------------------------------------------------------- shards and their manifest

SHARD = re.compile(r"[\w.-]*_(train|val)_\d+\.(npy|bin)", re.ASCII)


def count_ids(tokens: np.ndarray) -> np.ndarray:
    """How often each id occurs in a shard, (65536,) int64; in pieces, for the memory."""
    counts = np.zeros(2**16, dtype=np.int64)
    for start in range(0, len(tokens), 2**20):
        counts += np.bincount(tokens[start : start + 2**20], minlength=2**16)
    return counts


@dataclass
class Manifest:
    """manifest.json: from what and how the shards beside it were made, and what is in them."""

    dataset: str
    subset: str
    revision: str
    shard_tokens: int
    max_tokens: int | None
    text_column: str = "text"
    tokenizer: str = RANKS_SHA256
    prefix: str = ""  # of the shards' names
    commit: str | None = None  # what the Hub resolved the revision to; None for a folder
    files: dict = field(default_factory=dict)  # of the dataset, as they are read, and their bytes
    complete: bool = False
    resume_at: list = field(default_factory=lambda: [0, 0, 0])  # the Place where the next shard begins
    documents: int = 0
    shards: list = field(default_factory=list)  # {"name", "tokens", "sha256"} of each
    token_ids: list = field(default_factory=list)  # those that occur

    def __post_init__(self):
        name = re.sub(r"[^a-zA-Z0-9.]+", "-", Path(self.dataset).resolve().name).strip("-.") or "text"
        self.prefix = self.prefix or ("edufineweb" if self.dataset == FINEWEB_EDU else name)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """That of a folder; UserError if it is damaged, leads outside, or a shard has another length."""
        path = folder / "manifest.json"
        try:
            manifest = cls(**json.loads(path.read_bytes()))
            names = [shard["name"] for shard in manifest.shards] + [manifest.shard_name(0)]
            if not all(SHARD.fullmatch(name) for name in names):
                raise ValueError("a shard has a name that it cannot have")
            if any(name.startswith("/") or ".." in Path(name).parts for name in manifest.files):
                raise ValueError("a file leads out of the dataset")
            lengths = [shard["tokens"] for shard in manifest.shards]
        except DAMAGE as error:
            fix = f"restore it, or delete {folder} and start again"
            raise UserError(f"cannot read {path}: {one_line(error)}: {fix}") from None
        for name, length in zip(names, lengths, strict=False):
            if len(open_shard(folder / name)) != length:
                raise UserError(f"{folder / name} is not what manifest.json says: delete {folder} and start again")
        return manifest

    def save(self, folder: Path) -> None:
        """Replace manifest.json, whole or not at all, with a line for each field."""
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in dataclasses.asdict(self).items())
        with whole_file(folder / "manifest.json") as file:
            file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())

    def add(self, path: Path, resume_at: Place, complete: bool) -> None:
        """Enter a shard, and where the next one begins; UserError if its tokens are not GPT-2's."""
        tokens = open_shard(path)
        counts = count_ids(tokens)
        if counts[N_VOCAB:].any():
            wrong = np.flatnonzero(counts)[-1]
            raise UserError(f"{path} holds token {wrong}, which GPT-2 does not have: replace the file")
        self.token_ids = sorted({*self.token_ids, *np.flatnonzero(counts).tolist()})
        self.documents += int(counts[END_OF_TEXT])
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.shards.append({"name": path.name, "tokens": len(tokens), "sha256": digest})
        self.resume_at, self.complete = resume_at, complete

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards)

    def shard_name(self, number: int) -> str:
        """What a shard made here is called, counted from 0."""
        return f"{self.prefix}_{'train' if number else 'val'}_{number:06d}.npy"


def enter_shard(path: Path, folder: Path, manifest: Manifest, resume_at: list, complete: bool) -> None:
    """Enter a shard in the manifest, and move it beside that; say so where no bar shows it."""
    manifest.add(path, resume_at, complete)
    path.replace(folder / path.name)
    manifest.save(folder)
    if manifest.files and not sys.stderr.isatty():
        print(f"{path.name}: {manifest.tokens:,} tokens so far", file=sys.stderr, flush=True)


def write_shard(tokens: np.ndarray, folder: Path, manifest: Manifest, resume_at: list, complete: bool = False) -> None:
    """Write the next shard, then the manifest; killed between the two, the shard is written again."""
    path = folder / manifest.shard_name(len(manifest.shards))
    with whole_file(path) as file:
        # The same bytes as np.save(), which would hide that the disk is full.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(tokens))
        file.write(tokens.data)
    enter_shard(path, folder, manifest, resume_at, complete)


def find_token_ids(data_dir: str, n_vocab: int) -> list[int]:
    """The ids that occur in a folder's shards, ascending; UserError unless all are below n_vocab."""
    paths, token_ids = find_shards(data_dir, "train|val"), None
    with suppress(UserError):
        manifest = Manifest.load(Path(data_dir))
        if {shard["name"] for shard in manifest.shards} == {path.name for path in paths}:
            token_ids = manifest.token_ids
    if token_ids is None:
        bar = tqdm(paths, desc="which tokens occur", unit="shard", disable=None)
        token_ids = np.flatnonzero(sum(count_ids(open_shard(path)) for path in bar)).tolist()
    if not token_ids or token_ids[-1] >= n_vocab:
        what = f"token {token_ids[-1]}, the model knows {n_vocab}" if token_ids else "no tokens"
        raise UserError(f"{data_dir} holds {what}: replace the shards, or a manifest.json that is not about them")
    return token_ids


def write_shards(batches: Iterable[Batch], folder: Path, manifest: Manifest, workers: int = 1) -> None:
    """Tokenize batches from manifest.resume_at on, until their end or max_tokens."""
    buffer, filled = np.empty(manifest.shard_tokens, dtype=np.uint16), 0
    to_skip, most = manifest.resume_at[2], manifest.max_tokens or sys.maxsize
    to_take = most - manifest.tokens
    quiet = None if manifest.files else True  # None is tqdm's way to say: unless it is a terminal
    bar = tqdm(initial=manifest.tokens, unit="tok", unit_scale=True, disable=quiet, dynamic_ncols=True)
    with bar, closing(encode_batches(batches, workers)) as encoded:
        for batch in encoded:
            tokens = batch.content
            at = min(to_skip, len(tokens))  # how many of them are dealt with
            to_skip -= at
            while at < len(tokens) and to_take:
                if filled == len(buffer):
                    write_shard(buffer, folder, manifest, batch.place._replace(skip=at))
                    filled = 0
                taken = min(len(tokens) - at, len(buffer) - filled, to_take)
                buffer[filled : filled + taken] = tokens[at : at + taken]
                at += taken
                filled += taken
                to_take -= taken
            if not to_take:
                break
            bar.total = min(most, round((bar.n + len(tokens)) / batch.fraction))
            bar.update(len(tokens))
    # What fills no more than one shard is cut in two: a tenth for validation.
    begin = 0 if manifest.shards else max(1, filled // 10)
    if begin >= filled:
        raise UserError(f"{manifest.dataset} has too little text, or less than it had")
    if begin:
        write_shard(buffer[:begin], folder, manifest, Place(0, 0, begin))
    write_shard(buffer[begin:filled], folder, manifest, manifest.resume_at, complete=True)


# ---------------------------------------------------------------- sources

# Each row as a dict, None for an empty line, and the fraction of the file read so far.
Rows = Iterator[tuple[dict | None, float]]


class MissingField(ValueError):
    """Rows lack a field, and have others."""

    def __init__(self, name: str, others: Iterable[str]):
        super().__init__(f"no field named {name}, only {', '.join(map(str, others)) or 'none'}")


def read_parquet(path: Path, columns: tuple[str, ...]) -> Rows:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        lacking = [name for name in columns if name not in file.schema_arrow.names]
        if lacking:
            raise MissingField(lacking[0], file.schema_arrow.names)
        row = 0
        for batch in file.iter_batches(64, columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield record, row / file.metadata.num_rows


def read_json_lines(path: Path, columns: tuple[str, ...]) -> Rows:
    size = path.stat().st_size
    with open(path, "rb") as file, gzip.open(file) if path.suffix == ".gz" else nullcontext(file) as lines:
        for line in lines:
            yield json.loads(line) if line.strip() else None, file.tell() / size


def read_text(path: Path, columns: tuple[str, ...]) -> Rows:
    """The file as one document, or those between lines that are just <|endoftext|>; CR LF becomes LF."""
    size, document, separated = path.stat().st_size, bytearray(), False
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if number == 0:
                refuse_what_is_no_text(line)
                line = line.removeprefix(codecs.BOM_UTF8)
            if b"\0" in line:
                raise ValueError("it has NUL bytes, so it is no text")
            if line.strip(b"\r\n") == b"<|endoftext|>":
                separated = True
                if document.strip():
                    yield {columns[0]: document.removesuffix(b"\n").decode()}, file.tell() / size
                document.clear()
            else:
                document += line.replace(b"\r\n", b"\n")
    if document.strip() or (document and not separated):
        yield {columns[0]: document.decode()}, 1.0


def refuse_what_is_no_text(line: bytes) -> None:
    """Raise ValueError, which says what to do, if a file begins with this line."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16: convert it (iconv -f UTF-16 -t UTF-8)")
    if line.startswith(b"version https://git-lfs.github.com/spec/"):
        raise ValueError("it is a pointer of Git LFS, not the text: run git lfs pull")


# To read another format, add its suffix and a reader.
READERS = {".parquet": read_parquet, ".jsonl": read_json_lines, ".jsonl.gz": read_json_lines, ".txt": read_text}


def read_rows(path: Path, columns: tuple[str, ...] = ("text",)) -> Rows:
    """A file's rows, from its reader, which must raise one of DAMAGE for a bad file."""
    reader = next(READERS[suffix] for suffix in READERS if path.name.endswith(suffix))
    return reader(path, columns)


def read_batches(paths: Iterable[Path], manifest: Manifest) -> Iterator[Batch]:
    """The texts from manifest.resume_at on, by about BATCH_CHARACTERS; UserError for a bad row."""
    begin, first, _ = manifest.resume_at
    sizes = list(manifest.files.values())
    total, before = sum(sizes) + 1, sum(sizes[:begin]) + 1  # never 0
    column = manifest.text_column
    place, texts, characters = Place(begin, first), [], 0
    for number, path in enumerate(paths, begin):
        row = first
        try:
            for record, fraction in islice(read_rows(path, (column,)), first, None):
                if isinstance(record, dict) and column not in record:
                    raise MissingField(column, record)
                text = None if record is None else record[column]
                if not isinstance(text, str | None):
                    raise ValueError(f"{column} is {type(text).__name__}, not a string")
                if text is not None:
                    texts.append(text)
                    characters += len(text) + 1
                row += 1
                if characters >= BATCH_CHARACTERS:
                    yield Batch(place, (before + fraction * sizes[number]) / total, texts)
                    place, texts, characters = Place(number, row), [], 0
        except MissingField as error:
            raise UserError(f"{path}, row {row}: {error}: name the text's with --text_column") from None
        except DAMAGE as error:
            fix = "delete it if it was downloaded and run the same command again, else repair it"
            raise UserError(f"cannot read {path}, row {row}: {one_line(error)}: {fix}") from None
        before += sizes[number]
        first = 0
        if texts and (manifest.commit or number == len(sizes) - 1):  # don't keep texts waiting for a download
            yield Batch(place, before / total, texts)
            place, texts, characters = Place(number + 1, 0), [], 0


def ask_hub(function: Callable, *args, tries: int = 3, fix: str = "", **kwargs):
    """function(...) of huggingface_hub, tried so many times; UserError, which ends in `fix`."""
    for left in reversed(range(tries)):
        try:
            return function(*args, **kwargs)
        except Exception as error:  # the client's, the network library's and hf_xet's own
            if isinstance(error, OSError) and error.errno:  # of the disk
                raise
            if not left:
                fix = fix or f"check the network, --dataset, --subset and --revision; {AGAIN}"
                raise UserError(f"the Hub: {one_line(error)}: {fix}") from None
            time.sleep(1)


def find_source(manifest: Manifest) -> None:
    """Enter in a new manifest the files to read; UserError if there are none."""
    place = Path(manifest.dataset, manifest.subset)
    if os.path.isdir(manifest.dataset):
        files = {path.name: path.stat().st_size for path in place.glob("[!.]*") if path.is_file()}
        suffixes, names = tuple(READERS), []
    elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", manifest.dataset):
        files = list_hub(manifest)
        suffixes, names = (".parquet",), ready_made_shards(files, manifest.max_tokens or sys.maxsize)
        if len({Path(name).name for name in names}) < len(names):
            raise UserError(f"several shards in {place} have the same name: choose a folder of it with --subset")
    else:
        raise UserError(f"there is no folder {manifest.dataset} (on the Hub, a dataset would be OWNER/NAME)")
    names = names or sorted(name for name in files if name.endswith(suffixes))
    if not names:
        raise UserError(f"no {', '.join(suffixes)} files in {place}: check --dataset and --subset")
    manifest.files = {name: files[name] for name in names}


def list_hub(manifest: Manifest) -> dict[str, int]:
    """A dataset's files on the Hub, with their bytes, at a commit that is entered in the manifest."""
    from huggingface_hub import HfApi

    hub = HfApi()
    manifest.commit = ask_hub(hub.dataset_info, manifest.dataset, revision=manifest.revision).sha
    tree = partial(hub.list_repo_tree, repo_type="dataset", revision=manifest.commit, recursive=True)
    entries = ask_hub(lambda: list(tree(manifest.dataset, manifest.subset or None)))
    return {entry.path: entry.size for entry in entries if hasattr(entry, "size")}


def ready_made_shards(files: dict[str, int], max_tokens: int) -> list[str]:
    """Shards on the Hub: those for validation, then as many as max_tokens takes, at least one."""
    shards = [name for name in files if name.endswith(".bin") and SHARD.fullmatch(Path(name).name)]
    names, tokens = [], 0
    for name in sorted(shards, key=lambda name: ("_val_" not in name, name)):
        if tokens < max_tokens or "_train_" not in names[-1]:
            names.append(name)
            tokens += files[name] // 2 - 512  # of two bytes, after a header of 1,024
    return names


def fetch_files(manifest: Manifest, downloads: Path, keep: bool) -> Iterator[Path]:
    """The files from manifest.resume_at on, the Hub's one ahead, deleted after use unless kept."""
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
    for path in (*downloads.rglob("*.incomplete"), *(downloads / name for name in done)):  # a killed run's
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
        enter_shard(path, folder, manifest, Place(number, 0), number == end)


# ---------------------------------------------------------------- the whole job


def find_manifest(folder: Path, wanted: Manifest) -> Manifest | None:
    """The manifest of a folder, None if it has no shards; UserError if it has other settings."""
    if not (folder / "manifest.json").exists():
        if any(SHARD.fullmatch(path.name) for path in folder.glob("*")):
            raise UserError(f"{folder} holds shards, but no manifest.json to resume from: give another --out_dir")
        return None
    manifest = Manifest.load(folder)
    if not manifest.shards:
        return None
    for name in ("dataset", "subset", "revision", "text_column", "shard_tokens", "max_tokens", "tokenizer"):
        was, now = getattr(manifest, name), getattr(wanted, name)
        if was != now:
            raise UserError(f"{folder} was begun with {name} {was}, not {now}: give another --out_dir")
    return manifest


def check_folder(folder: Path) -> None:
    """Raise UserError if a folder has a manifest.json, but not all of its shards."""
    if (folder / "manifest.json").exists() and not Manifest.load(folder).complete:
        raise UserError(f"{folder} lacks shards: run the `python fineweb.py` command that began it again")


def build(folder: Path, wanted: Manifest, workers: int = 1, keep_downloads: bool = False) -> Manifest:
    """Make the wanted shards, or go on; whatever happens, complete ones stay."""
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
                size = sum(manifest.files.values()) / 1e9
                at = f" at {manifest.commit}" if manifest.commit else ""
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
    """The manifest of a folder; UserError unless it is complete, and right byte by byte."""
    manifest = Manifest.load(folder)
    found = dataclasses.replace(manifest, documents=0, shards=[], token_ids=[])
    for shard in tqdm(manifest.shards, unit="shard", disable=None):
        found.add(folder / shard["name"], manifest.resume_at, manifest.complete)
    names = {path.name for path in folder.glob("*") if SHARD.fullmatch(path.name)}
    wrong = names.symmetric_difference(shard["name"] for shard in manifest.shards)
    wrong |= {shard["name"] for shard in manifest.shards if shard not in found.shards}
    if wrong or found != manifest:
        what = ", ".join(sorted(wrong)) or "documents or token_ids"
        raise UserError(f"{folder / 'manifest.json'} is not about these shards: {what} differ")
    if not manifest.complete:
        raise UserError(f"the shards in {folder} are right, but not complete: run the command that began them again")
    return manifest


# ---------------------------------------------------------------- the demo corpus


def demo_documents() -> list[str]:
    """Prose that comes with every Python, by the page, shuffled: about 370,000 tokens."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]  # the language reference, which `help("for")` shows
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with warnings.catch_warnings(action="ignore"):  # escape sequences in other people's strings
            nodes = ast.walk(ast.parse(path.read_bytes()))  # never imported
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        docstrings = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]
        texts += [text for text in docstrings if len(text) >= 100]
    # A page ends with the first blank line after 1,500 characters.
    documents = [page for text in texts for page in re.findall(r"(?s).{1500,}?\n\n|.+", text)]
    random.Random(0).shuffle(documents)
    return documents


def write_demo(out_dir: Path) -> None:
    """Write the demo corpus as a folder of shards of 40,000 tokens, unless it is there."""
    while not any(out_dir.glob("*_train_*")):
        if out_dir.exists():
            raise UserError(f"{out_dir} is there already and holds no shards: remove it, or name another folder")
        with suppress(FileExistsError), whole_folder(out_dir) as folder:  # another may be faster
            manifest = Manifest("demo", "", "", shard_tokens=40_000, max_tokens=None)
            write_shards([Batch(Place(0, 0), 1.0, demo_documents())], folder, manifest)


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = Parser("fineweb.py", __doc__)
    add = partial(parser.add_argument, metavar="X")
    switch = partial(parser.add_argument, action="store_true")
    add("--out_dir", help="folder of the shards (default: edu_fineweb10B, demo_data; of others NAME_shards)")
    add("--dataset", default=FINEWEB_EDU, help="name on the Hub, or a folder (default: %(default)s)")
    add("--subset", help="folder in the dataset (default: FineWeb's sample/10BT, else all)")
    add("--revision", default="main", help="branch, tag or commit on the Hub (default: %(default)s)")
    add("--text_column", default="text", help="field of a row that holds the text (default: %(default)s)")
    add("--shard_tokens", type=int, default=10**8, help="tokens in a shard (default: 100 million)")
    add("--max_tokens", type=int, help="stop after so many tokens (default: take all)")
    add("--workers", type=int, default=cores, help="threads that tokenize (default: %(default)s)")
    switch("--keep_downloads", help="keep the downloads, in the Hub's own cache")
    switch("--demo", help="write the demo corpus, which needs no network")
    switch("--verify", help="compare the shards in --out_dir with their manifest.json")
    args = parser.parse_args(argv)
    if min(args.shard_tokens, args.workers, 1 if args.max_tokens is None else args.max_tokens) < 1:
        parser.error("--shard_tokens, --workers and --max_tokens must be above 0")
    subset = args.subset
    if subset is None:
        subset = "sample/10BT" if args.dataset.startswith("HuggingFaceFW/fineweb") else ""
    default = "edu_fineweb10B" if args.dataset == FINEWEB_EDU else f"{Path(args.dataset).resolve().name}_shards"
    folder = Path(args.out_dir or (DEMO_DIR if args.demo else default))
    if args.verify:
        manifest = verify(folder)
    elif args.demo:
        write_demo(folder)
        manifest = Manifest.load(folder)
    else:
        dataset = os.path.normpath(args.dataset) if os.path.isdir(args.dataset) else args.dataset
        wanted = Manifest(dataset, subset.strip("/"), args.revision, args.shard_tokens, args.max_tokens)
        wanted.text_column = args.text_column
        manifest = build(folder, wanted, args.workers, args.keep_downloads)
    shards = f"{len(manifest.shards)} shards (a short last one is normal)"
    print(f"{folder}: {shards}, {manifest.tokens:,} tokens, {manifest.documents:,} documents", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_script(main, "fineweb.py")
