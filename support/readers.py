"""Where texts come from: files, of which a table says what reads which suffix, and the Hugging Face Hub.

A reader is a generator, reader(path, columns, errors), of a file's rows: a dict with these columns, or None for an
empty row, and the fraction of the file that has been read. It raises one of DAMAGE for a bad file.
"""

import bz2
import csv
import gzip
import json
import lzma
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from io import StringIO, TextIOWrapper
from pathlib import Path, PurePath

import pyarrow as pa
from pyarrow.parquet import ParquetFile

from support.cli import UserError, one_line

Rows = Iterator[tuple[dict | None, float]]
LOG_IN = "run `hf auth login`, or set HF_TOKEN"
csv.field_size_limit(2**31 - 1)  # else 131,072 characters


class UnfitError(ValueError):
    """A file is not damaged, but can't be used as it is."""


class FieldError(UnfitError):
    """Rows lack the field that is asked for, or it holds no text."""

    fix = "name the text's field with --text_column, or move the file away"


def check_fields(columns: Iterable[str], found: Iterable[str]) -> None:
    """Raise FieldError, which names those that are there, if one of these columns is not."""
    for name in columns:
        if name not in found:
            raise FieldError(f"no field named {name}, only {', '.join(map(str, found)) or 'none'}")


def read_parquet(path: Path, columns: tuple[str, ...], errors: str) -> Rows:
    with ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        check_fields(columns, file.schema_arrow.names)
        row = 0
        for batch in file.iter_batches(64, columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield record, row / file.metadata.num_rows


def read_arrow(path: Path, columns: tuple[str, ...], errors: str) -> Rows:
    """Arrow IPC: a file, as polars writes it, or a stream, as `datasets` does."""
    with pa.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        check_fields(columns, reader.schema.names)
        n = reader.num_record_batches if is_file else 0
        for number, batch in enumerate(map(reader.get_batch, range(n)) if is_file else reader, 1):
            fraction = number / n if is_file else source.tell() / source.size()
            for start in range(0, len(batch), 64):
                for record in batch.select(columns).slice(start, 64).to_pylist():
                    yield record, fraction


# The package zstandard takes a file that was cut for a whole one.
open_zstd = partial(pa.CompressedInputStream, compression="zstd")
DECOMPRESS = {".gz": gzip.open, ".zst": open_zstd, ".zstd": open_zstd, ".bz2": bz2.open, ".xz": lzma.open}


def read_pieces(path: Path, errors: str, size: int = 2**15, lines: bool = False) -> Iterator[tuple[str, float]]:
    """A text file by so many characters, or by lines, and the fraction that is read; UnfitError if it is no text."""
    try:
        with open(path, "rb") as raw, DECOMPRESS.get(path.suffix.lower(), nullcontext)(raw) as file:
            text = TextIOWrapper(file, "utf-8-sig", errors, newline="\n")  # without a byte-order mark
            text._CHUNK_SIZE = size  # bytes that are decompressed at once, else 8192
            while True:
                pieces = text.readlines(size) if lines else [text.read(size)]
                if not any(pieces):
                    return
                if "\0" in "".join(pieces):
                    raise UnfitError("it has NUL bytes, so it is UTF-16 or no text")
                fraction = raw.tell() / path.stat().st_size
                for piece in pieces:
                    yield piece, fraction
    except UnicodeDecodeError:
        raise UnfitError("it is not UTF-8, which --errors replace takes") from None
    except OSError as error:
        if "too much memory" not in str(error):
            raise
        raise UnfitError("its window is above 128 MiB (zstd -d --long=31 unpacks it)") from None


def read_json(path: Path, columns: tuple[str, ...], errors: str) -> Rows:
    """JSON lines, or one array of objects, of which a part is in memory."""
    start = next((piece for piece, _ in read_pieces(path, errors) if piece.strip()), "")
    if not start.lstrip().startswith("["):
        for line, fraction in read_pieces(path, errors, lines=True):
            yield json.loads(line) if line.strip() else None, fraction
        return
    separator, scan, text = re.compile(r"\s*[\[,]?\s*"), json.JSONDecoder().raw_decode, ""
    for piece, fraction in read_pieces(path, errors, size=2**24):  # a longer value is tried with each piece
        text, at = text + piece, 0
        with suppress(ValueError):  # the piece ends within a value
            while True:
                value, at = scan(text, separator.match(text, at).end())
                yield value, fraction
        text = text[at:]
    if not re.fullmatch(r"\s*\[?\s*\]\s*", text):
        raise ValueError("here its array is cut, or no JSON")


def read_csv(path: Path, columns: tuple[str, ...], errors: str) -> Rows:
    """A line of names, then rows; an empty field is None, as most writers mean it."""
    fraction = 0.0

    def lines() -> Iterator[str]:
        nonlocal fraction
        for line, fraction in read_pieces(path, errors, lines=True):  # noqa: B007
            yield line

    rows = csv.reader(lines(), delimiter="\t" if ".tsv" in path.name.lower() else ",", strict=True)
    names = next(rows, columns)  # of an empty file any will do
    check_fields(columns, names)
    for row in rows:
        if row and len(row) != len(names):
            raise ValueError(f"it has {len(row)} fields, the first line {len(names)}")
        record = dict(zip(names, row, strict=False))
        yield {name: record.get(name) or None for name in columns}, fraction


def read_text(path: Path, columns: tuple[str, ...], errors: str) -> Rows:
    """The file as one document, or those between lines that are just <|endoftext|>; CR LF becomes LF."""
    document = StringIO()
    for line, fraction in read_pieces(path, errors, lines=True):
        if line.rstrip("\r\n") != "<|endoftext|>":
            document.write(line.replace("\r\n", "\n"))
            continue
        text = document.getvalue()
        document = StringIO()
        if text.strip():
            yield {columns[0]: text.removesuffix("\n")}, fraction
    text = document.getvalue()
    if text.strip():
        yield {columns[0]: text}, 1.0


# Of several kinds in a folder, the first is taken. Text is read compressed, too.
READERS = {".parquet": read_parquet, ".arrow": read_arrow, ".jsonl": read_json, ".ndjson": read_json,
           ".json": read_json, ".csv": read_csv, ".tsv": read_csv, ".txt": read_text}  # fmt: skip
TABLES = (read_parquet, read_arrow)
FORMATS = f"{', '.join(READERS)} ({', '.join(DECOMPRESS)})"


def find_reader(name: str) -> tuple[Callable | None, str]:
    """What reads a file of this name, None if nothing does; and the name without what tells its format."""
    path = PurePath(name)
    if path.suffix.lower() in DECOMPRESS:
        path = path.with_suffix("")
    return READERS.get(path.suffix.lower()), str(path.with_suffix(""))


def read_rows(path: Path, columns: tuple[str, ...] = ("text",), errors: str = "strict") -> Rows:
    """A file's rows; `errors` is what happens to text that is not UTF-8, "strict" or "replace"."""
    with open(path, "rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        raise UnfitError("it is a pointer of Git LFS, not the data (git lfs pull fetches that)")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnfitError("it is UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)")
    reader, _ = find_reader(path.name)
    return reader(path, columns, errors)


def ask_hub(function: Callable, dataset: str, *args, tries: int = 3, fix: str = "", **kwargs):
    """function(dataset, ...) of huggingface_hub, tried so many times; UserError, which ends in `fix`."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    for left in reversed(range(tries)):
        try:
            return function(dataset, *args, **kwargs)
        except GatedRepoError:
            page = f"{ENDPOINT}/datasets/{dataset}"
            raise UserError(f"{dataset} is gated: ask for access at {page}, then {LOG_IN}") from None
        except RepositoryNotFoundError:
            fix = f"check the name; if it is private, {LOG_IN}"
            raise UserError(f"there is no folder {dataset}, and no such dataset on the Hub: {fix}") from None
        except Exception as error:  # the client's, the network library's and hf_xet's own
            if isinstance(error, OSError) and error.errno:  # of the disk
                raise
            status = getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)
            if not left or status in (401, 403, 404):
                fix = fix or "check the network, --dataset, --subset and --revision; the same command again resumes"
                raise UserError(f"the Hub: {one_line(error)}: {fix}") from None
            time.sleep(1)


def read_configs(dataset: str, commit: str) -> dict[str, list[tuple[str, str]]]:
    """The configurations in a dataset's README.md: splits ("" if it names none) and patterns of paths."""
    from huggingface_hub import hf_hub_download, metadata_load
    from huggingface_hub.errors import RemoteEntryNotFoundError

    configs: dict[str, list[tuple[str, str]]] = {}
    with suppress(RemoteEntryNotFoundError):  # but no other refusal
        path = hf_hub_download(dataset, "README.md", repo_type="dataset", revision=commit)
        for entry in (metadata_load(path) or {}).get("configs") or []:
            files = entry.get("data_files") or "**"
            for file in files if isinstance(files, list) else [files]:
                split, paths = (str(file["split"]), file["path"]) if isinstance(file, dict) else ("", file)
                for path in paths if isinstance(paths, list) else [paths]:
                    pattern = os.path.normpath(Path(entry.get("data_dir", ""), path)).replace("**/", "**")
                    configs.setdefault(str(entry["config_name"]), []).append((split, pattern))
    return configs
