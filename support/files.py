"""Files and folders that appear whole or not at all, and results computed ahead of their use."""

import errno
import fcntl
import os
import shutil
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from support.cli import UserError

# What reading a damaged file may raise.
DAMAGE = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, EOFError, RuntimeError,
          MemoryError, zlib.error)  # fmt: skip


def read_plain(path: Path) -> bytes:
    """The content of a file; UserError if it is something else, a pipe say, which one would wait for."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a plain file: remove it")
    return path.read_bytes()


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write that appears at `path` complete or not at all.

    It is written as PATH.tmp in the same folder, flushed to the disk, then renamed. An exception inside leaves what
    stood at `path` as it was.
    """
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
    """A folder to fill that appears at `path` complete or not at all; OSError if something stands there already."""
    temporary = path.with_name(f".{path.name}.unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    parent = os.open(path.parent, os.O_RDONLY)
    with suppress(OSError):  # not every file system has locks
        fcntl.flock(parent, fcntl.LOCK_EX)  # two that fill a folder here take turns; it ends with the process
    try:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "already there", str(path))
        shutil.rmtree(temporary, ignore_errors=True)  # a killed run's
        temporary.mkdir()
        yield temporary
        for file_path in temporary.iterdir():
            with open(file_path, "rb") as file:
                os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(parent)


def background(function: Callable, *args) -> Future:
    """Start function(*args) in a daemon thread, so that the program can end before it does."""
    future = Future()

    def run():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def prefetch(function: Callable, arguments: Iterable, ahead: int = 3, start: Callable = background) -> Iterator:
    """Yield function(a) for each argument in turn, while the next few, begun by start(function, a), are computed."""
    arguments = iter(arguments)
    pending = deque(start(function, a) for a in islice(arguments, ahead))
    while pending:
        result = pending.popleft().result()
        pending.extend(start(function, a) for a in islice(arguments, 1))
        yield result
