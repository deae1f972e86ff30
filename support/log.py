"""The log of a run: log.jsonl, the console, and the curves."""

import fcntl
import gc
import json
import os
import shlex
import statistics
import subprocess
from collections import deque
from datetime import timedelta
from itertools import accumulate
from pathlib import Path

import torch

from support.cli import UserError, one_line, warn
from support.files import DAMAGE, whole_file
from support.world import World, peak_flops


class Log:
    """log.jsonl and the console, by the first rank; UserError if another run has locked the file."""

    def __init__(self, out_dir: str, world: World):
        self.path, self.picture = Path(out_dir, "log.jsonl"), Path(out_dir, "curves.png")
        self.world = world
        self.recent: deque[float] = deque(maxlen=20)  # tokens per second
        if not world.is_main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "ab+", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fix = "wait for its end, or give another --out_dir"
            raise UserError(f"another run is at work in {out_dir}: {fix}") from None
        except OSError:  # not every file system has locks
            pass
        # What a run that was killed may have left: half a line, half a file.
        if self.file.tell():
            self.file.seek(-1, os.SEEK_END)
            if self.file.read(1) != b"\n":
                self.file.write(b"\n")
        for left_over in (*Path(out_dir).glob("ckpt_*.pt.tmp"), Path(f"{self.picture}.tmp")):
            left_over.unlink(missing_ok=True)

    def write(self, event: str, step: int, text: str = "", **values) -> None:
        """Append a line to the file, and say the text."""
        if not self.world.is_main:
            return
        if text:
            self.world.say(f"step {step:5d} | {text}")
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, "step": step} | values) + "\n")
        except OSError as error:
            error.filename = str(self.path)  # which a failed write doesn't tell
            raise

    def begin(self, step: int, model, data, config, sample_config) -> None:
        """Log settings, versions and facts; UserError if the run began with other shards."""
        starts = read_log(self.path).get("start", {}) if step else {}
        before = [entry["train_tokens"] for entry in starts.values() if "train_tokens" in entry]
        if before and before[-1] != data.n_tokens:
            found = f"{config.data_dir} has {data.n_tokens} train tokens, but had {before[-1]} when this run began"
            raise UserError(f"{found}: restore those shards, or give another --out_dir")
        world = self.world
        device = torch.cuda.get_device_name(world.device) if world.on_gpu else world.device.type
        peak = peak_flops(world.device, world.dtype)
        self.mfu_of_a_token = model.flops_per_token() / (peak * world.size) if peak else None
        self.config = config
        facts = {
            "torch": torch.__version__, "device": device, "world_size": world.size,
            "commit": git_commit(), "parameters": model.n_params, "train_tokens": data.n_tokens,
            "data": data.paths[0].name.split("_")[0], "tokens_allowed": len(model.token_ids),
        }  # fmt: skip
        settings = vars(model.config) | vars(config) | vars(sample_config)
        self.write("start", step, **settings | facts)
        world.say(
            f"GPT-2 with {model.n_params:,} parameters on {world.size} x {device}, "
            f"{str(world.dtype).removeprefix('torch.')}; {data.n_tokens:,} tokens in {config.data_dir}; "
            f"step {step} to {config.max_steps}; files in {config.out_dir}"
        )
        if config.mask_unseen:
            world.say(f"{len(model.token_ids):,} of {model.config.n_vocab:,} tokens occur; the others are masked")

    def train(self, step: int, loss: float, norm: float, lr: float, tokens: int, seconds: float, left: int) -> None:
        """Log an update of so many tokens; `left` is how many are still to come."""
        rate = tokens / seconds
        self.recent.append(rate)
        mfu = self.mfu_of_a_token and rate * self.mfu_of_a_token
        measured = {"ms": 1000 * seconds, "tokens": tokens, "tokens_per_s": rate, "mfu": mfu}
        self.write("train", step, loss=loss, lr=lr, grad_norm=norm, **measured)
        time_left = timedelta(seconds=round(left / statistics.median(self.recent)))
        shown = f"MFU {mfu:.1%} | " if mfu else ""
        self.world.say(
            f"step {step:5d}/{self.config.max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | "
            f"{tokens:,} tokens in {1000 * seconds:.0f} ms, {rate:,.0f}/s | {shown}{time_left} left"
        )

    def last(self, event: str, key: str, default):
        """A value of the event's last line, on every rank; the default if there is none."""
        found = list(read_log(self.path).get(event, {}).values())
        return found[-1][key] if found else default

    def lacks(self, events: list[str], step: int) -> bool:
        """Whether one of these events is not logged at a step; the same answer on all ranks."""
        logged = read_log(self.path) if self.world.is_main else {}
        lacking = [event for event in events if step not in logged.get(event, ())]
        return self.world.any(self.world.is_main and lacking)

    def draw_curves(self) -> None:
        """Draw curves.png, or warn: a picture is no reason to end a run of days."""
        try:
            if self.world.is_main:
                draw_curves(self.path, self.picture)
                gc.collect()  # a figure is made of reference cycles, megabytes that would pile up
        except Exception as error:
            warn(f"cannot draw {self.picture}: {one_line(error)}")


def read_log(path: Path) -> dict[str, dict[int, dict]]:
    """The lines of a log by event and step, the last of each, none beyond a later start."""
    events: dict[str, dict[int, dict]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            event, step = str(entry["event"]), int(entry["step"])
        except (*DAMAGE, OverflowError):
            continue
        if event == "start":
            events = {name: {s: e for s, e in old.items() if s <= step} for name, old in events.items()}
        events.setdefault(event, {})[step] = entry
    return events


def draw_curves(log_path: Path, picture: Path) -> None:
    """Draw the losses against tokens, and HellaSwag below them, as a PNG."""
    from matplotlib.figure import Figure

    events = read_log(log_path)
    start, trained = list(events["start"].values())[-1], events.get("train", {})
    panels = 2 if "hellaswag" in events else 1
    figure = Figure(figsize=(9, 2 + 3.5 * panels), dpi=130, layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    steps = sorted(trained)
    million_tokens = {0: 0.0} | dict(zip(steps, accumulate(trained[s]["tokens"] / 1e6 for s in steps), strict=True))

    def curve(axis, event: str, key: str, label: str, **style) -> None:
        entries = {step: entry[key] for step, entry in events.get(event, {}).items() if step in million_tokens}
        if entries:
            label = label.format(list(entries.values())[-1])
            axis.plot([million_tokens[step] for step in entries], list(entries.values()), label=label, **style)

    dots = {"linewidth": 1.8, "marker": "o", "markersize": 3.5}
    curve(axes[0], "train", "loss", "training batch", color="#9db8d9", linewidth=0.9)
    curve(axes[0], "val", "loss", "validation, now {:.3f}", color="#1f4e8c", **dots)
    # The figures of OpenAI's models hold for this corpus and this context only.
    if start["data"] == "edufineweb" and start["block_size"] == 1024:
        axes[0].axhline(3.2924, color="0.4", linewidth=1, linestyle="--", label="OpenAI GPT-2 124M: 3.2924")
    if trained:  # the first steps would squeeze the rest
        axes[0].set_ylim(top=1.05 * trained[steps[len(steps) // 33]]["loss"])
    axes[0].set_ylabel("loss, nats per token")
    axes[0].set_title(f"GPT-2, {start['parameters'] / 1e6:.1f}M parameters, {start['data']} shards", loc="left")
    if panels == 2:
        curve(axes[1], "hellaswag", "acc_norm", "HellaSwag, now {:.4f}", color="#b4552d", **dots)
        axes[1].axhline(0.2955, color="0.4", linewidth=1, linestyle="--", label="OpenAI GPT-2 124M: 0.2955")
        axes[1].set_ylabel("accuracy (acc_norm)")
    for axis in axes:
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    axes[-1].set_xlabel("million training tokens")
    with whole_file(picture) as file:
        figure.savefig(file, format="png")


def git_commit() -> str | None:
    """The commit of this script, "-dirty" if it was changed since; None outside a git checkout."""
    root = shlex.quote(str(Path(__file__).resolve().parent.parent))
    status, commit = subprocess.getstatusoutput(f"git -C {root} describe --always --dirty --abbrev=40 --exclude='*'")
    return None if status else commit
