"""Command lines, and errors that a user reads as one line."""

import argparse
import dataclasses
import difflib
import math
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import field
from typing import NoReturn


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
        for name, value in vars(parsed).items():
            if value == []:  # what argparse makes of it
                self.error(f"--{name}=-- is not a value")
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
        message, status = one_line(error), 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        program += f" [rank {os.environ.get('RANK')}]"
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))  # a file's words may be any
    print(f"{program}: {line}", file=sys.stderr, flush=True)
    return status


def run_script(main: Callable[[], None], program: str) -> NoReturn:
    """End the process with the exit_status() of main()."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(exit_status(main, program))
    try:
        status = exit_status(main, program)
    except Exception:
        traceback.print_exc()
        status = 1
    # Threads of torch.distributed can outlive the interpreter: they would abort a process that has done its work, or
    # keep one that failed waiting for the other ranks.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters; of one from the system, the file and the cause."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def warn(message: str) -> None:
    """Print a warning, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


def option(default, help: str, minimum=None, choices=None, fixed: bool = False):
    """A config field with its command-line help and its bounds; a `fixed` one stays the same when a run resumes."""
    return field(default=default, metadata={"help": help, "minimum": minimum, "choices": choices, "fixed": fixed})


class Config:
    """A group of flags: checks each field against its bounds; what is wrong raises ValueError in one line."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, minimum, choices = getattr(self, f.name), f.metadata["minimum"], f.metadata["choices"]
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{f.name} {value} must be a finite number")
            if isinstance(value, int) and value >= 2**32:
                raise ValueError(f"--{f.name} {value} must be below 2**32")
            if minimum is not None and value < minimum:
                raise ValueError(f"--{f.name} {value} must be at least {minimum}")
            if choices and value not in choices:
                raise ValueError(f"--{f.name} {value} must be one of {', '.join(choices)}")
        self.check()

    def check(self):
        """Check what involves several fields."""
