"""Command lines made from config fields, and errors that a user reads as one line."""

import argparse
import dataclasses
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import field
from typing import Any, Literal, NoReturn, get_args


class UserError(Exception):
    """Something the user can fix: the text is the line they see, `status` the exit status."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def one_line(error: BaseException) -> str:
    """What an error says, in at most 300 characters; of the system's, the file and the cause."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def say(text: str, file=None) -> None:
    """Print a line. A terminal or a pipe that is gone ends no run: the log is the record."""
    with suppress(OSError):
        print(text, file=file, flush=True)


def warn(message: str) -> None:
    """Print a warning, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        say(f"warning: {message}", sys.stderr)


def exit_status(main: Callable[[], None], program: str) -> int:
    """Run main() and return the exit status, after one line on stderr for what the user can fix."""
    try:
        main()
        return 0
    except UserError as error:
        message, status = str(error), error.status
    except OSError as error:
        message, status = one_line(error), 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (RuntimeError, MemoryError) as error:  # the CPU's allocator has no exception of its own
        known = "out of memory|allocate memory|Storage size"
        if not isinstance(error, MemoryError) and not re.search(known, str(error)):
            raise
        fix = "take smaller batches (--micro_batch; --num_samples to sample) or a smaller model"
        message, status = f"out of memory: {fix} ({one_line(error)})", 1
    if os.environ.get("RANK") and os.environ.get("WORLD_SIZE") != "1":
        program += f" [rank {os.environ['RANK']}]"
    say(f"{program}: {' '.join(message.split())}", sys.stderr)
    return status


def run_script(main: Callable[[], None], program: str) -> NoReturn:
    """End the process with main()'s exit_status(), without a wait for threads that download or hang."""
    if sys.stderr is None:  # closed; print() would take stdout for it, and tqdm fail
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's lacks it, and a closed one is None
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows ASCII only is no reason to stop
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        status = exit_status(main, program)
    except KeyboardInterrupt:  # a second one
        status = 130
    except Exception:
        traceback.print_exc()
        status = 1
    if "IPython" in sys.modules:  # by %run, whose process goes on
        sys.exit(status)
    os._exit(status)


# What people write who come from other scripts, as in the parser's message, and what it is here.
HINTS = {
    "--(lr|learning.rate)": "it is --max_lr",
    r"--(batch.size|grad\w*.accum\w*)": "give --batch_tokens for a step, --micro_batch for a pass",
    "--(epochs|max_iters|(num_)?steps)": "give --max_steps",
    "--model": "give --init_from, or the shape by --n_layer, --n_head and --n_embd",
    r"arguments: \S+\.pt": "a run resumes by itself; other weights are taken by --init_from FILE",
    "(?i)arguments: (true|false|yes|no|0|1)": "a switch has no value: --compile, or --no-compile",
    r"arguments: \w+": "a text to go on from is given by --prompt, in quotes",
}


class Parser(argparse.ArgumentParser):
    """Command lines without abbreviations, whose errors are a UserError of status 2."""

    def __init__(self, prog: str, doc: str, epilog: str = ""):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, f"{prog} [flags]", doc, epilog, formatter_class=layout, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        table = HINTS if self.prog == "train_gpt2.py" else {}
        hints = [hint for words, hint in table.items() if re.search(rf"{words}\b", message)]
        raise UserError(f"{message} ({(hints or ['see --help'])[0]})", status=2)


def integer(text: str) -> int:
    """A number that is written as 1000000 or 1e6."""
    if float(text) % 1:
        raise ValueError
    return int(float(text))


def integer_or_auto(text: str) -> int | str:
    return text if text == "auto" else integer(text)


integer_or_auto.__name__ = "integer or auto"  # as argparse calls it


def option(default, help: str, min=None, fixed: bool = False, below=2**32):
    """A config field with its help and its bounds; a `fixed` one can't change on resume."""
    return field(default=default, metadata={"help": help, "min": min, "fixed": fixed, "below": below})


class Config:
    """A group of flags; ValueError, in one line, for a field out of its bounds."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, least, below = getattr(self, f.name), f.metadata["min"], f.metadata["below"]
            if least is None or value == "auto":
                continue
            if not least <= value < below:  # nan isn't, either
                raise ValueError(f"--{f.name} {value} must be at least {least}, and below {below}")
        self.check()

    def check(self):
        """Check what involves several fields."""


def as_flag(name: str, value) -> str:
    """How a command line says that a field has this value."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(str(value))}"


def how_to_parse(name: str, kind) -> dict[str, Any]:
    """Arguments of add_argument() for a field of this name and type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind is int:
        return {"type": integer, "metavar": "N"}
    if kind == int | Literal["auto"]:
        return {"type": integer_or_auto, "metavar": "N"}
    if get_args(kind):  # of a Literal
        return {"choices": get_args(kind), "metavar": "|".join(filter(None, get_args(kind)))}
    if kind is float:
        return {"type": float, "metavar": "FLOAT"}
    metavar = "DIR" if name.endswith("_dir") else "TEXT"
    if name == "prompt":
        return {"metavar": metavar}
    return {"type": os.path.expanduser, "metavar": metavar}  # as a shell leaves ~ alone in --out_dir=~/x


def parse_configs(argv: list[str] | None, doc: str, presets: dict, kinds: dict) -> tuple[dict[str, Any], list]:
    """The flags that were given, and a config of each kind, {title: class}.

    Presets, {(flag, value): defaults}, apply if that flag has that value; later ones override.
    """
    epilog = """A run resumes with the settings it began with. Free to change: folders, device,
dtype, compile, ranks, --micro_batch, what is measured, sampled and saved and
when, and, with --extend, a larger --max_steps. What --demo and --optimizer muon
change, unless other flags say otherwise, is in the script, in DEMO and MUON."""
    parser = Parser("train_gpt2.py", doc, epilog)
    modes = parser.add_argument_group("instead of training").add_mutually_exclusive_group()
    modes.add_argument("--sample", action="store_true", help="print samples of the newest checkpoint, or --init_from")
    modes.add_argument(
        "--export", type=os.path.expanduser, metavar="DIR", help="write that model as a folder for transformers"
    )
    for title, kind in kinds.items():
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(kind):
            text = f.metadata["help"] + ("" if f.default == "" else f" (default: {f.default})")
            group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **how_to_parse(f.name, f.type))
    flags = vars(parser.parse_args(argv))
    if flags["export"] and os.path.lexists(flags["export"]):
        raise UserError(f"--export {flags['export']}: that is there already, name a folder that isn't", 2)
    values = {}
    for (flag, value), defaults in presets.items():
        if flags.get(flag) == value:
            values |= defaults
    values |= flags
    configs = []
    for kind in kinds.values():
        names = {f.name for f in dataclasses.fields(kind)}
        try:
            configs.append(kind(**{name: value for name, value in values.items() if name in names}))
        except ValueError as error:
            raise UserError(str(error), status=2) from None
    return flags, configs
