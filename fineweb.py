"""Turn text into the shards that train_gpt2.py reads.

    python fineweb.py --demo          # demo_data/: prose that comes with Python, no network

A shard is a 1-D uint16 array of GPT-2 tokens in a .npy file: PREFIX_val_000000.npy first, then PREFIX_train_000001.npy
and so on. Documents follow each other, each one opened by <|endoftext|>, and run on from one shard into the next.
"""

import argparse
import ast
import binascii
import difflib
import hashlib
import os
import random
import sys
import sysconfig
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import tiktoken

RANKS_FILE = Path(__file__).resolve().parent / "assets" / "gpt2.tiktoken"
# Published by tiktoken, in openai_public.py.
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
END_OF_TEXT = 50256
N_VOCAB = 50257  # byte-pair ranks 0..50255, then <|endoftext|>

DEMO_DIR = "demo_data"
DEMO_SHARD_TOKENS = 40_000


# ---------------------------------------------------------------- shared by the three scripts


class UserError(Exception):
    """Something the user can mend: its text is the one line they get to see, `status` what the program exits with."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


class Parser(argparse.ArgumentParser):
    """Command lines without abbreviations, whose errors are a UserError of status 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)", status=2)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            self.error(f"unknown argument {unknown[0]}{f', did you mean {near[0]}?' if near else ''}")
        return parsed


def exit_status(main: Callable[[], None], program: str) -> int:
    """Run main() and return the exit status, after one line on stderr if the user has to mend something."""
    try:
        main()
        return 0
    except UserError as error:
        message, status = str(error), error.status
    except OSError as error:
        message, status = describe(error), 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    print(f"{program}: {message}", file=sys.stderr, flush=True)
    return status


def describe(error: OSError) -> str:
    """The file an OSError is about and what the system says, in one line."""
    text = error.strerror or str(error)
    line = f"{error.filename}: {text}" if error.filename else text
    return " ".join(line.split())


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that appears at `path` complete or not at all.

    It is written as PATH.tmp in the same folder, flushed to the disk, then renamed. An exception inside leaves what
    stood at `path` as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def prefetch(function: Callable, arguments: Iterable, ahead: int = 3) -> Iterator:
    """Yield function(a) for each argument in turn, while threads compute the next few."""
    arguments = iter(arguments)
    with ThreadPoolExecutor(ahead) as pool:
        pending = deque(pool.submit(function, a) for a in islice(arguments, ahead))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, a) for a in islice(arguments, 1))
            yield result


# ---------------------------------------------------------------- tokens


@cache
def tokenizer() -> tiktoken.Encoding:
    """The GPT-2 encoding, built from assets/gpt2.tiktoken; raises UserError if that file is missing or altered."""
    from tiktoken_ext.openai_public import r50k_pat_str

    try:
        content = RANKS_FILE.read_bytes()
    except OSError as error:
        raise UserError(f"the GPT-2 ranks, {describe(error)}: restore the file from the repository") from None
    if hashlib.sha256(content).hexdigest() != RANKS_SHA256:
        raise UserError(f"the SHA-256 of {RANKS_FILE} is not {RANKS_SHA256}: restore the file from the repository")
    pairs = (line.split() for line in content.splitlines())
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks={binascii.a2b_base64(token): int(rank) for token, rank in pairs},
        special_tokens={"<|endoftext|>": END_OF_TEXT},
        explicit_n_vocab=N_VOCAB,
    )


def encode_document(text: str) -> np.ndarray:
    """<|endoftext|> and the tokens of `text` as uint16; what looks like a special token in it is ordinary text."""
    return np.array([END_OF_TEXT, *tokenizer().encode_ordinary(text)], dtype=np.uint16)


# ---------------------------------------------------------------- shards


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a .npy shard, or of a .bin shard as llm.c writes them, as a 1-D uint16 memory map.

    Raises UserError if the file is anything else, or cut short.
    """
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            # llm.c dev/data/data_common.py: 256 int32, of which magic, version, number of tokens; then the tokens.
            header = np.fromfile(path, dtype="<i4", count=256)
            if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
                raise ValueError("no header of a version 1 token file")
            if (size := path.stat().st_size) != 1024 + 2 * int(header[2]):
                raise ValueError(f"its header promises {header[2]} tokens, its size is {size} bytes")
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024)
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError(f"{tokens.dtype} of shape {tokens.shape}, not a row of uint16")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read shard {path}: {one_line(error)}: replace or remove it") from None
    return tokens


class ShardWriter:
    """Cuts a stream of tokens into shards of `shard_tokens` each, the last one shorter; the first is for validation."""

    def __init__(self, out_dir: Path, prefix: str, shard_tokens: int):
        self.out_dir, self.prefix = out_dir, prefix
        self.buffer = np.empty(shard_tokens, dtype=np.uint16)
        self.filled = 0
        self.paths: list[Path] = []
        out_dir.mkdir(parents=True, exist_ok=True)

    def add(self, tokens: np.ndarray) -> None:
        """Append 1-D uint16 tokens to the stream, writing each shard as it fills up."""
        while len(tokens):
            taken = min(len(tokens), len(self.buffer) - self.filled)
            self.buffer[self.filled : self.filled + taken] = tokens[:taken]
            self.filled += taken
            tokens = tokens[taken:]
            if self.filled == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        """Write what is in the buffer, if anything, as the next shard."""
        if not self.filled:
            return
        split = "train" if self.paths else "val"
        path = self.out_dir / f"{self.prefix}_{split}_{len(self.paths):06d}.npy"
        with whole_file(path) as file:
            np.save(file, self.buffer[: self.filled], allow_pickle=False)
        self.paths.append(path)
        self.filled = 0


def write_shards(documents: Iterable[str], out_dir: Path, prefix: str, shard_tokens: int) -> list[Path]:
    """Tokenize documents, in order, into shards under `out_dir`; returns their paths, validation first."""
    writer = ShardWriter(out_dir, prefix, shard_tokens)
    for text in documents:
        writer.add(encode_document(text))
    writer.flush()
    return writer.paths


# ---------------------------------------------------------------- the demo corpus


def pages(text: str, characters: int = 2000) -> Iterator[str]:
    """Cut a text at blank lines into pieces of about so many characters."""
    page = ""
    for paragraph in text.split("\n\n"):
        if page and len(page) + len(paragraph) > characters:
            yield page
            page = ""
        page += f"{paragraph}\n\n"
    yield page


def demo_documents() -> list[str]:
    """English prose that comes with every Python, by the page, in an order that looks random and is always the same.

    The topics of the language reference (what `help("for")` shows) and the longer docstrings of the standard library's
    modules, which are parsed, never imported: about 370,000 tokens.
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escape sequences in other people's strings
            tree = ast.parse(path.read_bytes())
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
        docstrings = (ast.get_docstring(node) or "" for node in nodes)
        texts += [text for text in docstrings if len(text) >= 100]
    documents = [page for text in texts for page in pages(text)]
    random.Random(0).shuffle(documents)
    return documents


def write_demo(out_dir: Path) -> None:
    """Write the demo corpus as shards of 40,000 tokens, the folder all at once, unless there are shards in it."""
    if any(out_dir.glob("*_train_*")):
        return
    if out_dir.exists():
        raise UserError(f"{out_dir} is there already and holds no shards: remove it, or name another folder")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f"{out_dir.name}.") as folder:
        write_shards(demo_documents(), Path(folder) / "shards", "demo", DEMO_SHARD_TOKENS)
        (Path(folder) / "shards").rename(out_dir)


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="fineweb.py", description=__doc__)
    parser.add_argument("--demo", action="store_true", help="write the demo corpus, which needs no network")
    parser.add_argument("--out_dir", default=DEMO_DIR, help=f"folder for the shards (default: {DEMO_DIR})")
    args = parser.parse_args(argv)
    if not args.demo:
        raise UserError("only the demo corpus can be made so far: run `python fineweb.py --demo`", status=2)
    write_demo(Path(args.out_dir))
    print(f"the demo corpus is in {args.out_dir}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(exit_status(main, "fineweb.py"))
