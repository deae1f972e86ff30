"""The GPT-2 encoding, and the format of the shards."""

import binascii
import hashlib
import os
import re
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import numpy as np
import tiktoken

from support.cli import UserError, one_line

RANKS_FILE = Path(__file__).resolve().parent.parent / "assets" / "gpt2.tiktoken"
# Published by tiktoken, in openai_public.py.
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
END_OF_TEXT = 50256
N_VOCAB = 50257  # byte-pair ranks 0..50255, then <|endoftext|>
# GPT-2's pattern, with one pair of parentheses more than tiktoken's. What they hold needs no backtracking; as one group
# it goes to the fast path of the regular expressions, and encoding is 1.5 times as fast (benchmarks/tokenize.py).
PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # what \s means there
LAST_SPACE = re.compile(f"(?<=[{SPACE}])(?=[{SPACE}][^{SPACE}])")  # no token reaches across this place


@cache
def tokenizer() -> tiktoken.Encoding:
    """The GPT-2 encoding, built from assets/gpt2.tiktoken; raises UserError if that file is missing or altered."""
    content = RANKS_FILE.read_bytes() if RANKS_FILE.exists() else b""
    if hashlib.sha256(content).hexdigest() != RANKS_SHA256:
        raise UserError(f"{RANKS_FILE} is missing, or its SHA-256 is not {RANKS_SHA256}: restore the repository's")
    ranks = {binascii.a2b_base64(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    special = {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def encode_document(text: str) -> np.ndarray:
    """<|endoftext|> and the tokens of `text` as uint16; what looks like a special token in it is ordinary text."""
    encode = partial(tokenizer().encode_to_numpy, disallowed_special=())
    try:
        parts = [encode(text)]
    except ValueError:  # lone surrogates, or a run of a million spaces, too deep for the regular expression
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        parts = map(encode, LAST_SPACE.split(text))
    return np.concatenate([[END_OF_TEXT], *parts], dtype=np.uint16, casting="unsafe")


def open_shard(path: Path) -> np.ndarray:
    """A .npy shard, or a .bin shard as llm.c writes it, as a 1-D uint16 memory map; UserError if it is none, or cut."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            # llm.c dev/data/data_common.py: 256 int32, of which magic, version, number of tokens; then the tokens.
            header = np.fromfile(path, dtype="<i4", count=256)
            if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
                raise ValueError("no header of a version 1 token file")
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024, shape=(int(header[2]),))
        if not isinstance(tokens, np.memmap) or tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError("it is not a row of uint16")
        if (size := path.stat().st_size) != tokens.offset + tokens.nbytes:
            raise ValueError(f"its header promises {len(tokens)} tokens, its size is {size} bytes")
    except Exception as error:  # NumPy's parser of headers has those of Python's own
        raise UserError(f"cannot read shard {path}: {one_line(error)}: replace or remove it") from None
    return tokens


class Shard:
    """A shard to read from for days, one of any number: it is open only while it is read.

    Unlike a memory map's, its reader outlives a file that is cut short meanwhile.
    """

    def __init__(self, path: Path):
        self.path, self.state = path, self.identity(path)
        tokens = open_shard(path)
        self.length, self.offset = len(tokens), tokens.offset

    def __len__(self) -> int:
        return self.length

    @staticmethod
    def identity(file: int | Path) -> tuple:
        """What tells a file from another, and from itself once it is written to."""
        found = os.stat(file)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens from `start` on, (count,) uint16; UserError if the file at the path is not what it was at first."""
        with suppress(FileNotFoundError), open(self.path, "rb", buffering=0) as file:
            content = os.pread(file.fileno(), 2 * count, self.offset + 2 * start)
            if self.identity(file.fileno()) == self.state:
                return np.frombuffer(content, dtype="<u2")
        mend = "put it back as it was, and the same command goes on from the newest checkpoint"
        raise UserError(f"{self.path} was removed, replaced or changed during training: {mend}")
