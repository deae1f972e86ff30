"""The GPT-2 encoding, and the format of the shards."""

import binascii
import hashlib
import os
import re
from collections.abc import Iterable
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
    """The GPT-2 encoding; UserError if assets/gpt2.tiktoken is missing or altered."""
    content = RANKS_FILE.read_bytes() if RANKS_FILE.exists() else b""
    if hashlib.sha256(content).hexdigest() != RANKS_SHA256:
        raise UserError(f"{RANKS_FILE} is missing, or its SHA-256 is not {RANKS_SHA256}: restore the repository's")
    ranks = {binascii.a2b_base64(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    special = {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def encode_document(text: str) -> np.ndarray:
    """<|endoftext|> and the tokens of `text`, all of it ordinary text, as uint16."""
    encode = partial(tokenizer().encode_to_numpy, disallowed_special=())
    try:
        parts = [encode(text)]
    except ValueError:  # lone surrogates, or a run of a million spaces, too deep for the regular expression
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        parts = map(encode, LAST_SPACE.split(text))
    return np.concatenate([[END_OF_TEXT], *parts], dtype=np.uint16, casting="unsafe")


def find_shards(data_dir: str, split: str) -> list[Path]:
    """The shards of "train", "val" or "train|val", in order; UserError if there are none."""
    names = os.listdir(data_dir) if os.path.isdir(data_dir) else []
    paths = [Path(data_dir, name) for name in sorted(names) if re.search(rf"_({split})_\d+\.(npy|bin)$", name)]
    if not paths:
        fix = "run `python fineweb.py` first, or try `python train_gpt2.py --demo`"
        raise UserError(f"no {split.replace('|', ' or ')} shards in {data_dir}: {fix}")
    return paths


def open_shard(path: Path) -> np.ndarray:
    """A .npy shard, or a .bin shard of llm.c, as a 1-D uint16 memory map, or UserError."""
    try:
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
        size = path.stat().st_size
        if size != tokens.offset + tokens.nbytes:
            raise ValueError(f"its header promises {len(tokens)} tokens, its size is {size} bytes")
    except Exception as error:  # NumPy's parser of headers has those of Python's own
        raise UserError(f"cannot read shard {path}: {one_line(error)}: replace or remove it") from None
    return tokens


class Shard:
    """A shard to read from for days, one of any number: it is open only while it is read."""

    def __init__(self, path: Path, token_ids: Iterable[int]):
        self.path, tokens = path, open_shard(path)
        self.length, self.offset, self.state = len(tokens), tokens.offset, self.identity()
        self.known = np.zeros(2**16, dtype=bool)
        self.known[list(token_ids)] = True

    def __len__(self) -> int:
        return self.length

    def identity(self) -> tuple:
        """What tells the file from another, and from itself once it is written to."""
        found = self.path.stat()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens from `start` on, (count,) uint16; UserError if the file was changed, or they are others."""
        tokens = None
        with suppress(FileNotFoundError):
            tokens = np.fromfile(self.path, dtype="<u2", count=count, offset=self.offset + 2 * start)
        if tokens is None or self.identity() != self.state:
            fix = "put it back as it was, and the same command resumes from the newest checkpoint"
            raise UserError(f"{self.path} was removed, replaced or changed during training: {fix}")
        unknown = tokens[~self.known[tokens]]
        if len(unknown):
            what = f"token {unknown[0]}, which is none of the model's {self.known.sum()}"
            raise UserError(f"{self.path} holds {what}: restore it, or a manifest.json that is about it")
        return tokens
