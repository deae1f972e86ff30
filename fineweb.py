"""Turn text into the shards that train_gpt2.py reads.

    python fineweb.py                         # into edu_fineweb10B/
    python fineweb.py --max_tokens 500000000  # its first 500M tokens
    python fineweb.py --dataset my_texts      # a folder, a file, or OWNER/NAME
    python fineweb.py --demo                  # what comes with Python

A shard is a 1-D uint16 .npy file of GPT-2 tokens: PREFIX_val_000000.npy first,
then PREFIX_train_000001.npy and so on. <|endoftext|> opens each document. Made
from what manifest.json says; the same command resumes after the last shard.
"""

import ast
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import sys
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from glob import glob
from itertools import islice
from pathlib import Path
from typing import NamedTuple

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # which PYTHONSAFEPATH=1 leaves out
from support.cli import Parser, UserError, integer, one_line, run_script  # first, as support names the Python it needs

# isort: split
import numpy as np
from tqdm import tqdm

from support import readers
from support.files import DAMAGE, prefetch, whole_file, whole_folder
from support.tokens import END_OF_TEXT, RANKS_SHA256, cut, encode_document, find_shards, open_shard, tokenizer

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
CONVERTED = "refs/convert/parquet"  # there, each configuration has a folder
DEMO_DIR = "demo_data"
DOWNLOADS = ".fineweb_downloads"  # in the folder of the shards
AGAIN = "complete shards are kept, and the same command again resumes after them"

# ---------------------------------------------------------------- tokens

BATCH_CHARACTERS = 1_000_000  # what a worker gets at once: some 30 ms of work


class Place(NamedTuple):
    """A place in the dataset: `skip` tokens on from the start of a row of a file."""

    file: int
    row: int
    skip: int = 0


class Batch(NamedTuple):
    """Some documents, or their tokens (N,) uint16 with an <|endoftext|> before each; or a part of a long one."""

    place: Place  # of the first; the parts of a long one repeat it, by which write_shards() knows them
    fraction: float  # of the dataset, up to the end of the last
    content: list[str] | np.ndarray
    begins: bool = True  # with a document, not within one


def encode_batch(batch: Batch) -> Batch:
    """The batch with its documents replaced by their tokens."""
    text, opening = "<|endoftext|>".join(batch.content), "<|endoftext|>" if batch.begins else ""
    if text.count("<|endoftext|>") == len(batch.content) - 1:
        with suppress(ValueError):  # no text holds the token: one call gives the same, and frees Python's lock
            tokens = tokenizer().encode_to_numpy(opening + text, allowed_special="all")
            return batch._replace(content=tokens.astype(np.uint16))
    tokens = np.concatenate([encode_document(text) for text in batch.content])
    return batch._replace(content=tokens if batch.begins else tokens[1:])


# ---------------------------------------------------------------- shards and their manifest

SHARD = re.compile(r"[\w.-]*_(train|val)_\d+\.(npy|bin)", re.ASCII)
SETTINGS = ("dataset", "subset", "revision", "split", "val_split", "text_column", "errors", "shard_tokens",
            "max_tokens", "tokenizer")  # fmt: skip


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def name_of(dataset: str) -> str:
    """Of a folder or a dataset on the Hub its own name, of a file what stands before the first dot."""
    name = Path(dataset).resolve().name
    return name.split(".")[0] if os.path.isfile(dataset) else name


@dataclass
class Manifest:
    """manifest.json: from what and how the shards beside it were made, and what is in them."""

    dataset: str
    subset: str
    revision: str
    shard_tokens: int
    max_tokens: int | None
    text_column: str = "text"
    errors: str = "strict"
    split: str | None = None  # words in the names of files to train on, and to validate on; None: the usual ones
    val_split: str | None = None
    tokenizer: str = RANKS_SHA256
    prefix: str = ""  # of the shards' names
    commit: str | None = None  # what the Hub resolved the revision to; None for a folder
    files: dict = field(default_factory=dict)  # of the dataset, as they are read, and their bytes
    val_files: int = 0  # so many of them, the first, are for validation
    left_out: list = field(default_factory=list)  # files beside them
    modified: int | None = None  # the time of the newest, in ns; None on the Hub, and in manifests of before
    complete: bool = False
    resume_at: list = field(default_factory=lambda: [0, 0, 0])  # the Place where the next shard begins
    documents: int = 0
    shards: list = field(default_factory=list)  # {"name", "tokens", "sha256"} of each

    def __post_init__(self):
        name = re.sub(r"[^a-zA-Z0-9.]+", "-", name_of(self.dataset)).strip("-.") or "text"
        self.prefix = self.prefix or ("edufineweb" if self.dataset == FINEWEB_EDU else name)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """That of a folder; UserError if it is damaged, or a shard has another length."""
        path = folder / "manifest.json"
        try:
            found = json.loads(path.read_bytes())
            manifest = cls(**{f.name: found[f.name] for f in dataclasses.fields(cls) if f.name in found})
            shards = [(folder / shard["name"], shard["tokens"]) for shard in manifest.shards]
        except DAMAGE as error:
            fix = "restore it, or give another --out_dir"
            raise UserError(f"cannot read {path}: {one_line(error)}: {fix}") from None
        for shard, length in shards:
            if len(open_shard(shard)) != length:
                raise UserError(f"{shard} is not what manifest.json says: delete {folder} and start again")
        return manifest

    def save(self, folder: Path) -> None:
        """Replace manifest.json, whole or not at all, with a line for each field."""
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in dataclasses.asdict(self).items())
        with whole_file(folder / "manifest.json") as file:
            file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards)


def write_shard(tokens: np.ndarray, folder: Path, manifest: Manifest, resume_at: list, complete: bool = False) -> None:
    """Write the next shard, then the manifest; killed between the two, the shard is written again."""
    path = folder / f"{manifest.prefix}_{'train' if manifest.shards else 'val'}_{len(manifest.shards):06d}.npy"
    with whole_file(path) as file:
        # The same bytes as np.save(), which would hide that the disk is full.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(tokens))
        file.write(tokens.data)
    manifest.documents += int(np.count_nonzero(tokens == END_OF_TEXT))
    manifest.shards.append({"name": path.name, "tokens": len(tokens), "sha256": sha256(path)})
    manifest.resume_at, manifest.complete = resume_at, complete
    manifest.save(folder)
    if manifest.files and not sys.stderr.isatty():  # where no bar shows it
        print(f"{path.name}: {manifest.tokens:,} tokens so far", file=sys.stderr, flush=True)


def find_token_ids(data_dir: str, n_vocab: int) -> list[int]:
    """The ids that occur in a folder's shards, ascending; UserError unless all are below n_vocab."""
    seen = np.zeros(2**16, dtype=bool)
    for path in tqdm(find_shards(data_dir, "train|val"), desc="which tokens occur", unit="shard", disable=None):
        tokens = open_shard(path)
        for start in range(0, len(tokens), 2**20):  # in pieces, for the memory
            seen[tokens[start : start + 2**20]] = True
    token_ids = np.flatnonzero(seen).tolist()
    if token_ids and token_ids[-1] >= n_vocab:
        raise UserError(f"{data_dir} holds token {token_ids[-1]}, the model knows {n_vocab}: replace the shards")
    return token_ids


def write_shards(batches: Iterable[Batch], folder: Path, manifest: Manifest, workers=1, validation=False) -> None:
    """Tokenize batches from manifest.resume_at on, until their end or max_tokens; for validation, one shard at most."""
    buffer, filled = np.empty(manifest.shard_tokens, dtype=np.uint16), 0
    to_skip, most = manifest.resume_at[2], manifest.max_tokens or sys.maxsize
    done = manifest.tokens - (manifest.shards[0]["tokens"] if manifest.val_files and manifest.shards else 0)
    to_take = len(buffer) if validation else most - done
    place, before = None, 0  # of a batch, and how many tokens of a document in parts came before it
    quiet = None if manifest.files else True  # None is tqdm's way to say: unless it is a terminal
    bar = tqdm(initial=manifest.tokens, unit="tok", unit_scale=True, disable=quiet, dynamic_ncols=True)
    tokenizer()  # made once, not by each of the threads
    # Enough in advance to keep them busy while a shard is written.
    encoded = prefetch(encode_batch, batches, 2 * workers + 30, ThreadPoolExecutor(workers))
    with bar, closing(encoded):
        for batch in encoded:
            tokens = batch.content
            if batch.place != place:
                place, before = batch.place, 0
            at = min(to_skip, len(tokens))  # how many of them are dealt with
            to_skip -= at
            while at < len(tokens) and to_take:
                if filled == len(buffer):
                    write_shard(buffer, folder, manifest, place._replace(skip=before + at))
                    filled = 0
                taken = min(len(tokens) - at, len(buffer) - filled, to_take)
                buffer[filled : filled + taken] = tokens[at : at + taken]
                at += taken
                filled += taken
                to_take -= taken
            if not to_take:
                break
            before += len(tokens)
            bar.total = min(most, round((bar.n + len(tokens)) / batch.fraction))
            bar.update(len(tokens))
    # Without files for validation, what fills no more than one shard is cut in two: a tenth for that.
    begin = 0 if manifest.shards or validation else max(1, filled // 10)
    if begin >= filled:
        raise UserError(f"{manifest.dataset} has too little text{' for validation' if validation else ''}")
    if begin:
        write_shard(buffer[:begin], folder, manifest, Place(0, 0, begin))
    resume_at = Place(manifest.val_files, 0) if validation else manifest.resume_at
    write_shard(buffer[begin:filled], folder, manifest, resume_at, complete=not validation)


# ---------------------------------------------------------------- reading


def read_texts(paths: Iterable[Path], manifest: Manifest) -> Iterator[tuple[Place, float, str | None]]:
    """Each text from manifest.resume_at on, its place, the fraction of the dataset read; UserError for a bad row."""
    begin, first, _ = manifest.resume_at
    sizes, column = list(manifest.files.values()), manifest.text_column
    total, before = sum(sizes) + 1, sum(sizes[:begin]) + 1  # never 0
    for number, path in enumerate(paths, begin):
        row = first
        try:
            for record, fraction in islice(readers.read_rows(path, (column,), manifest.errors), first, None):
                if isinstance(record, dict):
                    readers.check_fields((column,), record)
                text = None if record is None else record[column]
                if not isinstance(text, str | None):
                    raise readers.FieldError(f"{column} is {type(text).__name__}, not a string")
                if text is not None:
                    yield Place(number, row), (before + fraction * sizes[number]) / total, text
                row += 1
        except DAMAGE as error:
            fix = getattr(error, "fix", "repair it, or move it away")
            if manifest.commit and not isinstance(error, readers.UnfitError):
                path.resolve().unlink()  # in the Hub's cache it is a link
                fix = "it is deleted, and the same command downloads it again (if in vain, it is bad on the Hub)"
            elif manifest.shards and not manifest.commit:
                fix += ", and give another --out_dir"
            raise UserError(f"cannot read {path}, row {row}: {one_line(error)}: {fix}") from None
        before += sizes[number]
        first = 0
        if manifest.commit:  # a batch doesn't wait for the next file, which is being downloaded
            yield Place(number, row), before / total, None


def read_batches(paths: Iterable[Path], manifest: Manifest) -> Iterator[Batch]:
    """The texts from manifest.resume_at on, by about BATCH_CHARACTERS; longer ones are cut."""
    texts, characters, begin, fraction = [], 0, None, 1.0
    for place, fraction, text in read_texts(paths, manifest):
        if text is not None:
            begin = begin or place
            texts.append(text)
            characters += len(text) + 1
        if texts and (characters >= BATCH_CHARACTERS or text is None):
            begins = True
            for part in cut(texts.pop(), BATCH_CHARACTERS):
                yield Batch(begin, fraction, [*texts, part], begins)
                texts, begins = [], False
            characters, begin = 0, None
    if texts:
        yield Batch(begin, fraction, texts)


# ---------------------------------------------------------------- which files

# Words in the names of files and folders that tell their split; where several occur, the first here counts.
WORDS = {"test": "tests?|testing|eval(uation)?|holdout", "val": "validation|validate|valid|val|dev", "train": "train"}
# What is never text: hidden files, Spark's, and what fineweb.py, `datasets` and others write beside it.
PASSED_OVER = re.compile(r"(^|/)([._]|(manifest|metadata|config|state|package|dataset_(infos?|dict))\.json$)")


def is_local(dataset: str) -> bool:
    return dataset.startswith((".", "/", "~")) or os.path.exists(dataset)


def split_of(label: str, manifest: Manifest) -> str:
    """The split of a file, by its path or what its dataset says: "train", "val", or "test" for what is left out."""
    chosen = {"val": manifest.val_split, "train": manifest.split}
    for part in reversed(label.lower().split("/")):
        for split, name in chosen.items():
            if name and re.search(rf"(?<![a-z0-9]){re.escape(name.lower())}(?![a-z0-9])", part):
                return split
        for split, words in WORDS.items():
            if re.search(f"(?<![a-z])({words})(?![a-z])", part):
                return "test" if chosen.get(split) else split
    return "test" if manifest.split else "train"


def find_source(manifest: Manifest) -> None:
    """Enter in a new manifest the files to read, those for validation first; UserError if there are none."""
    place, fix = Path(manifest.dataset, manifest.subset), "check --dataset and --subset"
    local = is_local(manifest.dataset)
    if local and place.exists():
        sizes, labels = list_folder(place), {".": manifest.split or "."}  # the dataset may be one file
    elif not local and re.fullmatch(r"\w[\w.-]*/[\w.-]+", manifest.dataset):
        sizes, labels = list_hub(manifest)
        fix += f", or take --revision {CONVERTED}, which the Hub makes of most datasets"
        if any(SHARD.fullmatch(Path(name).name) for name in sizes):
            fix = f"these are shards: hf download {manifest.dataset} --repo-type dataset --local-dir DIR"
    else:
        raise UserError(f"there is no folder {place} (on the Hub, a dataset would be OWNER/NAME)")
    found = {name: readers.find_reader(str(place / name)) for name in sorted(sizes)}
    kind = next((k for k in readers.READERS.values() if k in {reader for reader, _ in found.values()}), None)
    if kind is None:
        raise UserError(f"no {readers.FORMATS} files in {place}: {fix}")
    files, stems = {"val": [], "train": [], "test": []}, set()
    for name, (reader, stem) in found.items():
        if reader == kind and stem not in stems:  # else it is the same in another format, or compressed
            files[split_of(labels.get(name, name), manifest)].append(name)
            stems.add(stem)
    lacking = "train" if not files["train"] else "val" if manifest.val_split and not files["val"] else None
    if lacking:
        fix = f"choose by --split and --val_split ({some([*found])})"
        raise UserError(f"no file in {place} is for {lacking} by its name: {fix}")
    manifest.files = {name: sizes[name] for name in files["val"] + files["train"]}
    manifest.val_files = len(files["val"])
    manifest.left_out = sorted(sizes.keys() - manifest.files.keys())
    if local:
        manifest.modified = max((place / name).stat().st_mtime_ns for name in manifest.files)


def some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def list_folder(root: Path) -> dict[str, int]:
    """A file, or those in a folder and below it, by their paths, and their bytes."""
    if root.is_file():
        return {".": root.stat().st_size}
    files = {}
    for name in sorted(glob("**", root_dir=root, recursive=True), key=len):  # of a file's names, the shortest
        if (root / name).is_file() and not PASSED_OVER.search(name):
            files.setdefault(os.path.realpath(root / name), name)  # a link to a folder may lead in a circle
    return {name: (root / name).stat().st_size for name in files.values()}


def list_hub(manifest: Manifest) -> tuple[dict[str, int], dict[str, str]]:
    """Files of a configuration or folder on the Hub, their bytes, and what tells their splits; enters the commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    hub, dataset, name = HfApi(), manifest.dataset, manifest.subset
    commit = manifest.commit = readers.ask_hub(hub.dataset_info, dataset, revision=manifest.revision).sha

    def files_in(dataset: str, folder: str | None) -> dict[str, int]:
        with suppress(EntryNotFoundError):  # no such folder
            tree = hub.list_repo_tree(dataset, folder, repo_type="dataset", revision=commit, recursive=True)
            return {e.path: e.size for e in tree if hasattr(e, "size") and not PASSED_OVER.search(e.path)}
        return {}

    configs = {} if "/" in name else readers.ask_hub(readers.read_configs, dataset, commit)  # they have no slash
    if not name and len(configs) > 1:
        raise UserError(f"choose by --subset one of the configurations of {dataset}: {', '.join(configs)}")
    if name in configs or (configs and not name):
        sizes, labels = readers.ask_hub(files_in, dataset, None), {}
        for split, pattern in configs[name or next(iter(configs))]:
            for path in sizes:
                # As in a shell, * stays within a folder.
                if fnmatchcase(path, pattern) and ("**" in pattern or path.count("/") == pattern.count("/")):
                    labels[path] = split or path
        return {path: sizes[path] for path in labels}, labels
    sizes = readers.ask_hub(files_in, dataset, name or None)
    tops = sorted({path.split("/")[0] for path in sizes})
    if manifest.revision == CONVERTED and not name and len(tops) > 1:
        raise UserError(f"choose by --subset one of the configurations of {dataset}: {', '.join(tops)}")
    if name and not sizes:
        there = f"nor one of the configurations of {dataset}: {', '.join(configs) or 'none'}"
        raise UserError(f"no folder {name}, {there}")
    return sizes, {path: path.removeprefix(f"{name}/") for path in sizes}


def fetch_files(manifest: Manifest, downloads: Path, keep: bool, end: int | None = None) -> Iterator[Path]:
    """The files from manifest.resume_at to `end`, the Hub's one ahead, deleted after use unless kept."""
    left = [*manifest.files][manifest.resume_at[0] : end]
    if manifest.commit is None:
        yield from (Path(manifest.dataset, manifest.subset, name) for name in left)
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    warnings.filterwarnings("ignore", "Not enough free disk space")  # it is an error soon enough
    folder = None if keep else downloads  # None is the Hub's own cache
    download = partial(hf_hub_download, repo_type="dataset", revision=manifest.commit, local_dir=folder)
    for path in map(Path, prefetch(partial(readers.ask_hub, download, manifest.dataset), left, ahead=1)):
        yield path
        if not keep:
            path.unlink(missing_ok=True)


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
    for name in SETTINGS:
        was, now = getattr(manifest, name), getattr(wanted, name)
        if was != now:
            raise UserError(f"{folder} was begun with {name} {was}, not {now}: give another --out_dir")
    return manifest


def check_folder(folder: Path) -> None:
    """Raise UserError if a folder has a manifest.json, but not all of its shards."""
    if (folder / "manifest.json").exists() and not Manifest.load(folder).complete:
        raise UserError(f"{folder} lacks shards: run the `python fineweb.py` command that began it again")


def check_source(manifest: Manifest, wanted: Manifest) -> None:
    """Enter the files to read; UserError if those in a folder are no longer those of a manifest that was begun."""
    if manifest is not wanted and (manifest.modified is None or not os.path.exists(manifest.dataset)):
        return  # at a commit nothing changes, shards outlive the texts, and manifests of before don't know
    find_source(wanted)
    if (wanted.files, wanted.modified) != (manifest.files, manifest.modified):
        differ = sorted({name for name, _ in wanted.files.items() ^ manifest.files.items()})
        what = f"the files in {wanted.dataset} are not those of the start ({some(differ) or 'by their times'})"
        raise UserError(f"{what}: give another --out_dir, or restore them")


def make_shards(folder: Path, manifest: Manifest, workers: int, keep_downloads: bool) -> None:
    """Do what is left to do, from manifest.resume_at on."""
    names, n = [*manifest.files], manifest.val_files
    at = f" at {manifest.commit}" if manifest.commit else ""
    line = f"{manifest.dataset}{at}: {len(names)} files, {sum(manifest.files.values()) / 1e9:.2f} GB"
    for what, some_files in (("for validation", names[:n]), ("left out", manifest.left_out)):
        line += f"; {what}: {some(some_files)}" if some_files else ""
    print(line, file=sys.stderr, flush=True)
    if not (manifest.shards or manifest.commit or manifest.max_tokens or manifest.errors == "replace"):
        check_text(manifest)
    manifest.save(folder)
    fetch = partial(fetch_files, manifest, folder / DOWNLOADS, keep_downloads)
    if n and not manifest.shards:
        write_shards(read_batches(fetch(end=n), manifest), folder, manifest, workers, validation=True)
    write_shards(read_batches(fetch(), manifest), folder, manifest, workers)


def check_text(manifest: Manifest) -> None:
    """Read the files of text in a folder; UserError that names all that are not UTF-8."""
    faults = []
    for name in tqdm(manifest.files, desc="is it text", unit="file", leave=False, disable=None):
        path = Path(manifest.dataset, manifest.subset, name)
        try:
            readers.read_rows(path)  # refuses what is a pointer of Git LFS
            if readers.find_reader(path.name)[0] not in readers.TABLES:
                deque(readers.read_pieces(path, "strict"), maxlen=0)
        except DAMAGE as error:
            faults.append(f"{path} ({one_line(error)})")
    if faults:
        raise UserError(f"cannot read {', '.join(faults)}: convert them, move them away, or take --errors replace")


def build(folder: Path, wanted: Manifest, workers: int = 1, keep_downloads: bool = False) -> Manifest:
    """Make the wanted shards, or go on; whatever happens, complete ones stay."""
    from filelock import FileLock, Timeout

    lock = folder / ".fineweb_lock"
    try:
        manifest = find_manifest(folder, wanted) or wanted
        check_source(manifest, wanted)
        if manifest.complete and not lock.exists():
            return manifest
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, blocking=False):
            manifest = find_manifest(folder, wanted) or wanted  # another process may just have made it
            try:
                if not manifest.complete:
                    make_shards(folder, manifest, workers, keep_downloads)
            finally:
                if manifest.complete or not manifest.shards:
                    shutil.rmtree(folder / DOWNLOADS, ignore_errors=True)
                if not manifest.shards and not any(folder.glob("*.npy")):  # nothing is in the way of another try
                    (folder / "manifest.json").unlink(missing_ok=True)
                lock.unlink()
                with suppress(OSError):
                    folder.rmdir()
    except Timeout:
        raise UserError(f"another fineweb.py is at work in {folder}: wait until it has finished") from None
    except OSError as error:
        raise UserError(f"{one_line(error)}; {AGAIN}") from None
    except KeyboardInterrupt:
        raise UserError(f"interrupted; {AGAIN}", status=130) from None
    return manifest


def verify(folder: Path) -> Manifest:
    """The manifest of a folder; UserError unless it is complete, and right byte by byte."""
    manifest = Manifest.load(folder)
    names = {path.name for path in folder.glob("*") if SHARD.fullmatch(path.name)}
    wrong = names.symmetric_difference(shard["name"] for shard in manifest.shards)
    bar = tqdm(manifest.shards, unit="shard", disable=None)
    wrong |= {shard["name"] for shard in bar if sha256(folder / shard["name"]) != shard["sha256"]}
    if wrong:
        raise UserError(f"manifest.json is not about these shards: {some(sorted(wrong))} differ in {folder}")
    check_folder(folder)
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
    add = parser.add_argument
    switch = partial(parser.add_argument, action="store_true")
    add("--out_dir", type=os.path.expanduser, help="folder of the shards (default: edu_fineweb10B, or NAME_shards)")
    add("--dataset", default=FINEWEB_EDU, help="name on the Hub, a folder or a file (default: %(default)s)")
    add("--subset", help="folder or configuration of the dataset (default: FineWeb's sample/10BT, else all)")
    add("--revision", default="main", help="branch, tag or commit on the Hub (default: %(default)s)")
    add("--split", help="train on files with this word in their names (default: those that are not named val or test)")
    add("--val_split", help="validate on files with this word (default: validation, valid, val or dev; else a shard)")
    add("--text_column", default="text", help="field of a row that holds the text (default: %(default)s)")
    add("--errors", default="strict", choices=["strict", "replace"], help="for what is not UTF-8: stop, or U+FFFD")
    add("--shard_tokens", type=integer, default=10**8, help="tokens in a shard (default: 100 million)")
    add("--max_tokens", type=integer, help="stop after so many, files for validation aside (default: take all)")
    add("--workers", type=int, default=cores, help="threads that tokenize (default: %(default)s)")
    switch("--keep_downloads", help="keep the downloads, in the Hub's own cache")
    switch("--demo", help="write the demo corpus, which needs no network")
    switch("--verify", help="compare the shards in --out_dir with their manifest.json")
    args = parser.parse_args(argv)
    if min(args.shard_tokens, args.workers, 1 if args.max_tokens is None else args.max_tokens) < 1:
        parser.error("--shard_tokens, --workers and --max_tokens must be above 0")
    subset = args.subset
    if subset is None:
        subset = "sample/10BT" if args.dataset in (FINEWEB_EDU, "HuggingFaceFW/fineweb") else ""
    dataset = os.path.normpath(os.path.expanduser(args.dataset)) if is_local(args.dataset) else args.dataset
    default = "edu_fineweb10B" if dataset == FINEWEB_EDU else f"{name_of(dataset)}_shards"
    folder = Path(args.out_dir or (DEMO_DIR if args.demo else default))
    if args.verify:
        manifest = verify(folder)
    elif args.demo:
        write_demo(folder)
        manifest = Manifest.load(folder)
    else:
        flags = vars(args) | {"dataset": dataset, "subset": subset.strip("/"), "tokenizer": RANKS_SHA256}
        wanted = Manifest(**{name: flags[name] for name in SETTINGS})
        manifest = build(folder, wanted, args.workers, args.keep_downloads)
    shards = f"{len(manifest.shards)} shards (a short last one is normal)"
    print(f"{folder}: {shards}, {manifest.tokens:,} tokens, {manifest.documents:,} documents", file=sys.stderr)


if __name__ == "__main__":
    run_script(main, "fineweb.py")
