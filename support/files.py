"""Files and folders that appear whole or not at all, and results computed ahead of their use."""

import csv
import errno
import lzma
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

# What reading a damaged or foreign file may raise, in any of the formats.
DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError, EOFError, RecursionError, zlib.error,
          lzma.LZMAError, csv.Error)  # fmt: skip


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, PATH.tmp, that appears at `path` complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # a killed run's, or a link to anywhere
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(path)  # which a failed write() doesn't tell
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that appears at `path` complete or not at all; OSError if one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        folder = Path(temporary, path.name)
        folder.mkdir()
        yield folder
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "already there", str(path))
        folder.rename(path)


def prefetch(function: Callable, arguments: Iterable, ahead: int = 3, pool: Executor | None = None) -> Iterator:
    """Yield function(a) for each argument in turn, while threads compute the next few."""
    pool, arguments = pool or ThreadPoolExecutor(ahead), iter(arguments)
    try:
        pending = deque(pool.submit(function, a) for a in islice(arguments, ahead))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, a) for a in islice(arguments, 1))
            yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
