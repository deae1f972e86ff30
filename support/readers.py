"""Documents from files: a table says which suffix is read by what, and whatever it lists is read.

A reader is a generator, reader(path, columns, errors), of a file's rows: a dict with these columns, or None for an
empty row, and the fraction of the file that has been read. It raises one of DAMAGE for a bad file.
"""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path, PurePath

Rows = Iterator[tuple[dict | None, float]]
csv.field_size_limit(sys.maxsize)  # else 131,072 characters


class UnfitError(ValueError):
    """A file is not damaged, but can't be used as it is; `fix` says what to do."""

    fix = "convert it, or leave it out"


class FieldError(UnfitError):
    """Rows lack the field that is asked for, or it holds no text."""

    fix = "name the text's field with --text_column, or move the file away"


def check_fields(columns: Iterable[str], found: Iterable[str]) -> None:
    """Raise FieldError, which names those that are there, if one of these columns is not."""
    for name in columns:
        if name not in found:
            raise FieldError(f"no field named {name}, only {', '.join(map(str, found)) or 'none'}")


def read_parquet(path: Path, columns: tuple[str, ...], errors: str) -> Rows:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        check_fields(columns, file.schema_arrow.names)
        row = 0
        for batch in file.iter_batches(64, columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield record, row / file.metadata.num_rows


def read_arrow(path: Path, columns: tuple[str, ...], errors: str) -> Rows:
    """Arrow IPC: a file, as polars writes it, or a stream, as `datasets` does."""
    import pyarrow as pa

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


def open_zstd(raw):
    """By pyarrow: the package zstandard takes a file that was cut for a whole one."""
    import pyarrow as pa

    return pa.CompressedInputStream(raw, "zstd")


DECOMPRESS = {".gz": gzip.open, ".zst": open_zstd, ".zstd": open_zstd, ".bz2": bz2.open, ".xz": lzma.open}


def read_pieces(path: Path, errors: str, size: int = 2**16) -> Iterator[tuple[str, float]]:
    """A text file piece by piece, and the fraction that is read; UnfitError if it is no UTF-8 text."""
    decode = codecs.getincrementaldecoder("utf-8-sig")(errors).decode  # without a byte-order mark
    total, begins = max(1, path.stat().st_size), True
    try:
        with open(path, "rb") as raw, DECOMPRESS.get(path.suffix.lower(), nullcontext)(raw) as file:
            for piece in iter(partial(file.read, size), b""):
                if begins and piece.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise UnfitError("it is UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)")
                if b"\0" in piece:
                    raise UnfitError("it has NUL bytes, so it is no text")
                begins = False
                yield decode(piece), raw.tell() / total
            yield decode(b"", final=True), 1.0
    except UnicodeDecodeError:
        raise UnfitError("it is not UTF-8, which --errors replace takes") from None
    except OSError as error:
        if "too much memory" not in str(error):
            raise
        raise UnfitError("its window is above 128 MiB (zstd -d --long=31 unpacks it)") from None


def read_blocks(path: Path, errors: str) -> Iterator[tuple[str, float]]:
    """Its whole lines, some at a time; the last may lack its line feed."""
    pending: list[str] = []
    for piece, fraction in read_pieces(path, errors):
        end = piece.rfind("\n") + 1
        if end:
            pending = ["".join([*pending, piece[:end]])]
            yield pending.pop(), fraction  # not held here, as it may be long
        pending.append(piece[end:])
    if any(pending):
        yield "".join(pending), 1.0


def read_lines(path: Path, errors: str) -> Iterator[tuple[str, float]]:
    """Its lines, without their line feeds."""
    for block, fraction in read_blocks(path, errors):
        lines = block.split("\n")
        del block
        if not lines[-1]:
            lines.pop()
        for line in lines:
            yield line, fraction


def read_json(path: Path, columns: tuple[str, ...], errors: str) -> Rows:
    """JSON lines, or one array of objects, of which a part is in memory."""
    start = next((piece for piece, _ in read_pieces(path, errors) if piece.strip()), "")
    if not start.lstrip().startswith("["):
        for line, fraction in read_lines(path, errors):
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
        for line, fraction in read_lines(path, errors):  # noqa: B007
            yield line + "\n"

    rows = csv.reader(lines(), delimiter="\t" if ".tsv" in path.name.lower() else ",", strict=True)
    names = next(rows, None)
    if names is None:  # an empty file
        return
    check_fields(columns, names)
    for row in rows:
        if row and len(row) != len(names):
            raise ValueError(f"it has {len(row)} fields, the first line {len(names)}")
        record = dict(zip(names, row, strict=False))
        yield {name: record.get(name) or None for name in columns}, fraction


def read_text(path: Path, columns: tuple[str, ...], errors: str) -> Rows:
    """The file as one document, or those between lines that are just <|endoftext|>; CR LF becomes LF."""
    separator, separated = re.compile(r"^<\|endoftext\|>(?:\n|\Z)", re.MULTILINE), False
    pending: list[str] = []
    for block, fraction in read_blocks(path, errors):
        *ends, rest = separator.split(block.replace("\r\n", "\n"))
        for end in ends:
            separated = True
            document = "".join([*pending, end])
            pending = []
            if document.strip():
                yield {columns[0]: document.removesuffix("\n")}, fraction
        pending.append(rest)
    document = "".join(pending)
    if document.strip() or (document and not separated):
        yield {columns[0]: document}, 1.0


# Of several kinds in a folder, the first is taken. Text is read compressed, too.
READERS: dict[str, Callable[[Path, tuple[str, ...], str], Rows]] = {
    ".parquet": read_parquet, ".arrow": read_arrow, ".jsonl": read_json, ".ndjson": read_json, ".json": read_json,
    ".csv": read_csv, ".tsv": read_csv, ".txt": read_text,
}  # fmt: skip
TABLES = (read_parquet, read_arrow)
FORMATS = f"{', '.join(READERS)} ({', '.join(DECOMPRESS)})"


def find_reader(name: str) -> tuple[Callable | None, str]:
    """What reads a file of this name, None if nothing does; and the name without what tells its format."""
    path = PurePath(name)
    if path.suffix.lower() not in DECOMPRESS:
        return READERS.get(path.suffix.lower()), str(path.with_suffix(""))
    path = path.with_suffix("")
    reader = READERS.get(path.suffix.lower())
    return None if reader in TABLES else reader, str(path.with_suffix(""))


def read_rows(path: Path, columns: tuple[str, ...] = ("text",), errors: str = "strict") -> Rows:
    """A file's rows; `errors` is what happens to text that is not UTF-8, "strict" or "replace"."""
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs.github.com/spec/"):
            raise UnfitError("it is a pointer of Git LFS, not the data (git lfs pull fetches that)")
    reader, _ = find_reader(path.name)
    return reader(path, columns, errors)
