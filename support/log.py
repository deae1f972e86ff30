"""log.jsonl and the curves that are drawn from it."""

import fcntl
import json
import os
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

from support.cli import UserError
from support.files import DAMAGE, read_plain, whole_file
from support.world import World


class Log:
    """log.jsonl: one JSON object a line, appended by the first rank as things happen.

    It is locked for as long as this object lives; UserError if another process has locked it.
    """

    def __init__(self, path: Path, world: World):
        self.path, self.enabled = path, world.is_main
        if not self.enabled:
            return
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(f"{path} is no plain file: remove it, or give another --out_dir")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "ab+", buffering=0)  # noqa: SIM115
        several_machines = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
        for seconds_left in range(120 if several_machines else 0, -1, -1):  # a lost machine's lock may outlive it
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not seconds_left:
                    mend = "wait for its end, or give another --out_dir"
                    raise UserError(f"another run is at work in {path.parent}: {mend}") from None
                time.sleep(1)
            except OSError:  # not every file system has locks
                break
        # A run that was killed may have left half a line.
        if self.file.tell() and (self.file.seek(-1, os.SEEK_END), self.file.read(1))[1] != b"\n":
            self.file.write(b"\n")

    def write(self, event: str, step: int, **values) -> None:
        if self.enabled:
            line = json.dumps({"event": event, "step": step} | values) + "\n"
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(line)
            except OSError as error:
                error.filename = str(self.path)  # which a failed write doesn't tell
                raise


def read_log(path: Path) -> dict[str, dict[int, dict]]:
    """The lines of a log by event and step, the last of each; lines that are not whole are passed over.

    A run that starts at some step takes the place of what was logged beyond it.
    """
    events: dict[str, dict[int, dict]] = {}
    # Each key once in memory, not once a line.
    decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: {sys.intern(key): value for key, value in pairs})
    for line in read_plain(path).decode(errors="replace").splitlines():
        try:
            entry = decoder.decode(line)
            event, step = str(entry["event"]), int(entry["step"])
        except DAMAGE:
            continue
        if event == "start":
            events = {name: {s: e for s, e in old.items() if s <= step} for name, old in events.items()}
        events.setdefault(event, {})[step] = entry
    return events


def draw_curves(log_path: Path, picture: Path) -> None:
    """Draw the losses against tokens, and HellaSwag below them once it has been measured, as a PNG."""
    from matplotlib.figure import Figure

    events = read_log(log_path)
    start = list(events["start"].values())[-1]
    steps = sorted(events.get("train", {}))
    seen = dict(zip(steps, accumulate(events["train"][step]["tokens"] for step in steps), strict=True)) | {0: 0}
    panels = 2 if "hellaswag" in events else 1
    figure = Figure(figsize=(9, 2 + 3.5 * panels), dpi=130, layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]

    def curve(axis, event: str, key: str, label: str, **style) -> None:
        if entries := events.get(event):
            shown = [step for step in entries if step in seen]
            x, y = [seen[step] for step in shown], [entries[step][key] for step in shown]
            axis.plot(x, y, label=label.format(y[-1]), **style)

    def reference(axis, value: float, text: str) -> None:
        axis.axhline(value, color="0.4", linewidth=1, linestyle="--")
        axis.annotate(text, (1, value), (-4, 3), ("axes fraction", "data"), "offset points", ha="right", color="0.4")

    dots = {"linewidth": 1.8, "marker": "o", "markersize": 3.5}
    curve(axes[0], "train", "loss", "training batch", color="#9db8d9", linewidth=0.9)
    curve(axes[0], "val", "loss", "validation, now {:.3f}", color="#1f4e8c", **dots)
    # The figures of OpenAI's models hold for this corpus and this context only.
    if start["data"] == "edufineweb" and start["block_size"] == 1024:
        reference(axes[0], 3.2924, "OpenAI GPT-2 124M: 3.2924")
    if losses := [e["loss"] for e in events.get("train", {}).values()]:
        axes[0].set_ylim(top=1.05 * losses[len(losses) // 33])  # the first hundredths of a run would squeeze the rest
    axes[0].set_ylabel("loss, nats per token")
    axes[0].set_title(f"GPT-2, {start['parameters'] / 1e6:.1f}M parameters, {start['data']} shards", loc="left")
    if panels == 2:
        curve(axes[1], "hellaswag", "acc_norm", "HellaSwag, now {:.4f}", color="#b4552d", **dots)
        reference(axes[1], 0.2955, "OpenAI GPT-2 124M: 0.2955")
        reference(axes[1], 0.337, "GPT-3 124M: 0.337")
        axes[1].set_ylabel("accuracy (acc_norm)")
    for axis in axes:
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, loc="upper right" if axis is axes[0] else "lower right")
    units = ((1e9, "B"), (1e6, "M"), (1e3, "k"), (0, ""))
    axes[-1].xaxis.set_major_formatter(lambda x, _: next(f"{x / (u or 1):g}{name}" for u, name in units if abs(x) >= u))
    axes[-1].set_xlabel("training tokens")
    with whole_file(picture) as file:
        figure.savefig(file, format="png")


def git_commit() -> str | None:
    """The commit of this script, "-dirty" if it was changed since; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.check_output(
            command, cwd=Path(__file__).parent.parent, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def check_same_data(log_path: Path, data, config) -> None:
    """Raise UserError if the run of this log read other shards: then its order of sequences would not be this one."""
    starts = read_log(log_path).get("start") if log_path.exists() else None
    before = starts[max(starts)].get("train_tokens") if starts else None
    if before not in (None, data.n_tokens):
        found = f"{config.data_dir} has {data.n_tokens} train tokens, but had {before} when this run began"
        raise UserError(f"{found}: restore those shards, or give another --out_dir")
