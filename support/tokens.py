"""The GPT-2 encoding, and the format of the shards."""

import binascii
import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache, partial
from itertools import pairwise
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
# Places that no token reaches across: before the first space of several or of one, and before the last of several.
CUT = re.compile(f"(?<=[^{SPACE}])(?=[{SPACE}])|(?<=[{SPACE}])(?=[{SPACE}][^{SPACE}])")


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
        parts = map(encode, CUT.split(text))
    return np.concatenate([[END_OF_TEXT], *parts], dtype=np.uint16, casting="unsafe")


def cut(text: str, length: int) -> Iterator[str]:
    """A text in pieces of at least so many characters, but for the last, that have the same tokens."""
    start, place = 0, CUT.search(text, length)
    while place:
        yield text[start : place.start()]
        start = place.start()
        place = CUT.search(text, start + length)
    yield text[start:]


def find_shards(data_dir: str, split: str) -> list[Path]:
    """The shards of "train", "val" or "train|val", in order; UserError if there are none."""
    # With a number or, as some of llm.c's, without one; nanoGPT's are train.bin and val.bin.
    pattern = re.compile(rf"([^.].*_)?({split})(_\d+)?\.(npy|bin)")
    paths = sorted(path for path in Path(data_dir).glob("*") if pattern.fullmatch(path.name))
    if not paths:
        fix = (
            "run `python fineweb.py` first, or try --demo; shards of your own are called NAME_train_000001.npy or .bin"
        )
        if split == "val":
            fix = "call a shard NAME_val_000000.npy or .bin, or train without validation (--eval_every 0)"
        raise UserError(f"no {split.replace('|', ' or ')} shards in {data_dir}: {fix}")
    for path, other in pairwise(paths):
        if path.stem == other.stem:
            raise UserError(f"{path} is there as .npy, too: remove one of them")
    return paths


def open_shard(path: Path) -> np.ndarray:
    """A .npy shard, or a .bin shard of llm.c or nanoGPT, as a 1-D uint16 memory map, or UserError."""
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            # llm.c dev/data/data_common.py: 256 int32, of which magic, version, number of tokens; then the tokens.
            header = np.fromfile(path, dtype="<i4", count=3).tolist()
            offset, length = (1024, header[2]) if header[:2] == [20240520, 1] else (0, None)
            if not offset and path.name not in ("train.bin", "val.bin"):  # nanoGPT's, which are tokens alone
                raise ValueError("no header of a version 1 token file")
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=length)
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            line = f"np.save('{path}', np.load('{path}').astype('uint16').ravel())"
            raise ValueError(f"it is {tokens.ndim}-D {tokens.dtype}, not 1-D uint16, to which this converts it: {line}")
        if path.stat().st_size != tokens.offset + tokens.nbytes:
            raise ValueError(f"it is longer than the {len(tokens)} tokens that its header names")
    except Exception as error:  # NumPy's parser of headers has those of Python's own
        raise UserError(f"cannot read shard {path}: {one_line(error)}: replace or remove it") from None
    return tokens


class Shard:
    """A shard to read from for days, one of any number: it is open only while it is read."""

    def __init__(self, path: Path, token_ids: Iterable[int]):
        self.path, tokens, found = path, open_shard(path), path.stat()
        self.length, self.offset, self.state = len(tokens), tokens.offset, (found.st_size, found.st_mtime_ns)
        self.known = np.isin(np.arange(2**16), list(token_ids))

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens from `start` on, (count,) uint16; UserError if the file was changed, or they are others."""
        state = tokens = None
        with suppress(FileNotFoundError):
            tokens = np.fromfile(self.path, dtype="<u2", count=count, offset=self.offset + 2 * start)
            state = self.path.stat().st_size, self.path.stat().st_mtime_ns
        if state != self.state:
            raise UserError(f"{self.path} was removed, replaced or changed during training: put it back as it was")
        unknown = tokens[~self.known[tokens]]
        if len(unknown):
            raise UserError(f"{self.path} holds token {unknown[0]}, which is none of the model's: restore it")
        return tokens
