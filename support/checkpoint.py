"""Checkpoints: written whole, read without running code, the newest one that is not damaged."""

import dataclasses
import os
import re
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from support.cli import UserError, one_line, warn
from support.files import whole_file


class DamagedError(UserError):
    """A checkpoint file that is damaged: its archive, its checksums or its pickle stream can't be read."""


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem[5:])


def find(out_dir: str) -> list[Path]:
    """The checkpoints of a run, oldest first; OSError if the folder is there and can't be read."""
    try:
        names = os.listdir(out_dir)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((Path(out_dir, name) for name in names if re.fullmatch(r"ckpt_\d+\.pt", name)), key=step_of)


def save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, config) -> Path:
    """Write ckpt_STEP.pt, whole or not at all, then drop those before it but one and --keep_every's; gives its path."""
    path = Path(config.out_dir) / f"ckpt_{step:06d}.pt"
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"step {step}: the weights are not finite, so they are not saved: take a lower --max_lr")
    with whole_file(path) as file:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        state |= {"GPTConfig": dataclasses.asdict(model.config), "TrainConfig": dataclasses.asdict(config)}
        if config.mask_unseen:
            state["token_ids"] = model.token_ids.tolist()
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's writer hides the reason, a full disk say, in the context
            raise UserError(f"cannot write {path}: {one_line(error.__context__ or error)}") from None
    # Later ones, which are damaged as the run began before them, don't count.
    for old in [path for path in find(config.out_dir) if step_of(path) <= step][:-2]:
        if not config.keep_every or step_of(old) % config.keep_every:
            old.unlink()
    return path


def read(path: Path) -> dict[str, Any]:
    """A checkpoint as it was saved, its tensors on the CPU; no code in the file is run.

    Raises DamagedError for a file that can't be read, UserError for one that this script didn't write.
    """
    try:
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path) as archive:
            if part := archive.testzip():  # compares the checksums, which torch.load() doesn't
                raise ValueError(f"{part} in it is damaged")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, PermissionError, FileNotFoundError):
        raise
    except Exception as error:  # a damaged pickle stream raises any of a dozen kinds
        # torch's own words for a file that holds code are an advice to run it.
        holds_code = isinstance(error, UnpicklingError | zipfile.BadZipFile)
        why = "no checkpoint, or one that holds code" if holds_code else one_line(error)
        raise DamagedError(f"cannot read checkpoint {path} ({why}): restore it or move it away") from None
    if not isinstance(state, dict) or "GPTConfig" not in state:
        raise UserError(f"cannot read checkpoint {path}: train_gpt2.py didn't write it, as it has no GPTConfig")
    return state


def newest(out_dir: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that is not damaged, and where it lies; None if there is none at all."""
    found = find(out_dir)
    for path in reversed(found):
        try:
            return path, read(path)
        except DamagedError as error:
            if path == found[0]:
                raise
            warn(f"{error}; taking the one before it")
    return None


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what an optimizer had learned; its settings stay those of the command line."""
    settings = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
    for group in optimizer.param_groups:
        if not group.get("fused"):
            continue
        for p in group["params"]:  # a fused kernel trusts the shapes that it is given
            for name, value in optimizer.state[p].items():
                if torch.is_tensor(value) and value.dim() and value.shape != p.shape:
                    shapes = f"{tuple(value.shape)} for a weight of shape {tuple(p.shape)}"
                    raise ValueError(f"the optimizer's {name} in the checkpoint has shape {shapes}")


def check_same_run(state: dict[str, Any], gpt_config, config) -> None:
    """Raise UserError, naming the field, if the run that wrote the checkpoint had other settings where it matters."""
    for now in (config, gpt_config) if gpt_config else (config,):
        saved = state[type(now).__name__]
        for f in dataclasses.fields(now):
            was, value = saved.get(f.name, f.default), getattr(now, f.name)
            grows = f.name == "max_steps" and value > was
            idle = f.name == "batch_ramp_from" and not config.batch_ramp_steps
            # Weights of --init_from bring a shape of their own, of which the user can choose the positions alone.
            brought = now is gpt_config and config.init_from != "scratch" and f.name != "block_size"
            if value == was or not f.metadata["fixed"] or (grows and config.extend) or idle or brought:
                continue
            flag = f"--{f.name} {was}" if f.type is not bool else f"--{'' if was else 'no-'}{f.name}"
            mend = f"give {flag} to go on with it{', --extend to let it grow' if grows else ''}"
            found = f"--{f.name} is {value}, but {was} in the run in {config.out_dir}"
            raise UserError(f"{found}: {mend}, or another --out_dir", status=2)
