"""The log of a run: log.jsonl, the console, and the curves."""

import gc
import importlib
import json
import math
import re
import statistics
import sys
from collections import deque
from datetime import datetime
from itertools import accumulate
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from support.cli import UserError, one_line, warn
from support.files import DAMAGE, whole_file
from support.world import World, peak_flops


class Log:
    """log.jsonl and the console, by the first rank; until close(), it keeps other runs out of the folder."""

    def __init__(self, out_dir: str, world: World):
        self.path, self.picture = Path(out_dir, "log.jsonl"), Path(out_dir, "curves.png")
        self.world = world
        self.recent: deque[float] = deque(maxlen=20)  # tokens per second
        self.skipped = 0  # steps of this process
        self.tracker = None
        self.lock = FileLock(Path(out_dir, ".lock"), blocking=False)
        if not world.is_main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except Timeout:
            fix = "wait for its end, or give another --out_dir"
            raise UserError(f"another run is at work in {out_dir}: {fix}") from None
        except OSError as error:  # not every file system has locks
            warn(f"no lock keeps other runs out of {out_dir}: {one_line(error)}")
        # What a run that was killed may have left: half a line, half a file.
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            with open(self.path, "a") as file:
                file.write("\n")
        for left_over in (*Path(out_dir).glob("ckpt_*.pt.tmp"), Path(f"{self.picture}.tmp")):
            left_over.unlink(missing_ok=True)

    def close(self) -> None:
        self.lock.release()  # first, as who waits for a tracker's network may interrupt it
        self.track("finish")

    def write(self, event: str, step: int, text: str = "", **values) -> None:
        """Append a line to the file, and say the text."""
        if not self.world.is_main:
            return
        if text:
            self.world.say(f"step {step:5d} | {text}")
        time = datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, "step": step, "time": time} | values) + "\n")
        except OSError as error:
            error.filename = str(self.path)  # which a failed write doesn't tell
            raise
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self.track("log", {f"{event}/{key}": value for key, value in numbers.items()}, step=step)

    def begin(self, step: int, model, optimizer, data, config, sample_config) -> None:
        """Log settings, versions and facts; UserError if the run began with other shards."""
        was = self.last("start", "train_tokens", data.n_tokens) if step else data.n_tokens
        if was != data.n_tokens:
            found = f"{config.data_dir} has {data.n_tokens} train tokens, but had {was} when this run began"
            raise UserError(f"{found}: restore those shards, or give another --out_dir")
        world = self.world
        device = torch.cuda.get_device_name(world.device) if world.on_gpu else world.device.type
        peak = peak_flops(world.device, world.dtype)
        self.mfu_of_a_token = model.flops_per_token() / (peak * world.size) if peak else None
        self.max_steps = config.max_steps
        short = config.max_steps <= 2000 or (sys.stdout and sys.stdout.isatty())
        self.print_every = config.print_every or (1 if short else 10)
        facts = {
            "torch": torch.__version__, "device": device, "world_size": world.size,
            "parameters": model.n_params, "train_tokens": data.n_tokens,
            "data": data.paths[0].name.split("_")[0], "tokens_allowed": len(model.token_ids),
        }  # fmt: skip
        settings = vars(model.config) | vars(config) | vars(sample_config) | facts
        self.write("start", step, **settings)
        if config.track and world.is_main:
            self.begin_tracking(config.track, settings)
        dtype = str(world.dtype).removeprefix("torch.")
        what = f"GPT-2 with {model.n_params:,} parameters, {type(optimizer).__name__}"
        world.say(f"{what}, on {world.size} x {device}, {dtype}")
        world.say(f"{data.n_tokens:,} tokens in {config.data_dir}; step {step} to {config.max_steps}")
        if config.mask_unseen:
            world.say(f"{len(model.token_ids):,} of {model.config.n_vocab:,} tokens occur; the others are masked")

    def begin_tracking(self, package: str, settings: dict) -> None:
        """Begin a run of wandb or trackio, or go on with this log's; UserError if that can't be."""
        first = next(iter(read_log(self.path)["start"].values()))
        name = re.sub(r"\W+", "-", f"{self.path.resolve().parent.name}-{first.get('time', '')}")
        own_id = {"id": name} if package == "wandb" else {}  # to trackio the name is enough
        try:
            tracker = importlib.import_module(package)
            tracker.init(project="train_gpt2", name=name, resume="allow", config=settings, **own_id)
        except ImportError:
            raise UserError(f"--track {package}: run `pip install {package}` first") from None
        except Exception as error:  # no login, say
            raise UserError(f"--track {package}: {one_line(error)}") from None
        self.tracker = tracker

    def track(self, action: str, *args, **kwargs) -> None:
        """Have the tracker do something, if there is one; what it can't do ends no run."""
        try:
            if self.tracker:
                getattr(self.tracker, action)(*args, **kwargs)
        except Exception as error:
            warn(f"continuing without --track: {one_line(error)}")
            self.tracker = None

    def train(self, step: int, loss: float, norm: float, lr: float, tokens: int, seconds: float, left: int) -> None:
        """Log an update of so many tokens; `left` is how many are still to come."""
        rate = tokens / seconds
        self.recent.append(rate)
        mfu = self.mfu_of_a_token and rate * self.mfu_of_a_token
        measured = {"ms": 1000 * seconds, "tokens": tokens, "tokens_per_s": rate, "mfu": mfu}
        skipped = not math.isfinite(norm)  # by float16's scaler
        self.skipped += skipped
        self.write("train", step, loss=loss, lr=lr, grad_norm=None if skipped else norm, **measured)
        if step % self.print_every == 0 or step == self.max_steps:
            minutes, s = divmod(round(left / statistics.median(self.recent)), 60)
            speed = f"{rate:,.0f}/s" if rate < 10_000 else f"{rate / 1000:,.0f}k/s"
            speed += f" | MFU {mfu:.0%}" if mfu else ""
            speed += f" | {self.skipped} skipped" if self.skipped else ""
            self.world.say(
                f"step {step:5d}/{self.max_steps} | loss {loss:.4f} | norm {norm:.2f} | {speed} | "
                f"{minutes // 60}:{minutes % 60:02}:{s:02} left"
            )

    def last(self, event: str, key: str, default):
        """A value of the event's last line, on every rank; the default if there is none."""
        found = list(read_log(self.path).get(event, {}).values())
        return found[-1].get(key, default) if found else default

    def lowest(self, event: str, key: str) -> float:
        """The least of an event's values so far."""
        return min(entry[key] for entry in read_log(self.path)[event].values())

    def draw_curves(self) -> None:
        """Draw curves.png, or warn: a picture is no reason to end a run of days."""
        try:
            if self.world.is_main:
                draw_curves(self.path, self.picture)
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
    """Draw the losses against tokens, and HellaSwag below them, as a PNG, with the figures of OpenAI's GPT-2 124M."""
    from matplotlib.figure import Figure

    gc.collect()  # the last figure is made of reference cycles, megabytes that would pile up
    events = read_log(log_path)
    start, trained = list(events["start"].values())[-1], events.get("train", {})
    # Of which event what is drawn; a loss can be compared on the same corpus, in the same context only.
    panels = [("val", "loss", 3.2924 if start["data"] == "edufineweb" and start["block_size"] == 1024 else None)]
    if "hellaswag" in events:
        panels.append(("hellaswag", "acc_norm", 0.2955))
    figure = Figure(figsize=(9, 2 + 3.5 * len(panels)), dpi=130, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    axes[0].set_title(f"GPT-2, {start['parameters'] / 1e6:.1f}M parameters, {start['data']} shards", loc="left")
    axes[-1].set_xlabel("million training tokens")
    steps = sorted(trained)
    million_tokens = {0: 0.0} | dict(zip(steps, accumulate(trained[s]["tokens"] / 1e6 for s in steps), strict=True))
    if trained:
        losses = [trained[step]["loss"] for step in steps]
        x = [million_tokens[step] for step in steps]
        axes[0].plot(x, losses, label="training batch", color="#9db8d9", linewidth=0.9)
        axes[0].set_ylim(top=1.05 * losses[len(steps) // 33])  # the first steps would squeeze the rest
    for axis, (event, key, openai) in zip(axes, panels, strict=True):
        measured = {step: entry[key] for step, entry in events.get(event, {}).items() if step in million_tokens}
        if measured:
            x, y = [million_tokens[step] for step in measured], list(measured.values())
            axis.plot(x, y, "o-", label=f"{event}, now {y[-1]:.4f}", color="#1f4e8c", markersize=3.5)
        if openai:
            axis.axhline(openai, color="0.4", linewidth=1, linestyle="--", label=f"OpenAI's GPT-2 124M: {openai}")
        axis.set_ylabel("loss, nats per token" if key == "loss" else key)
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    with whole_file(picture) as file:
        figure.savefig(file, format="png")
