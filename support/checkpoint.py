"""Checkpoints: written whole, read without running code, the newest one that is not damaged."""

import dataclasses
import os
import re
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from support.cli import UserError, as_flag, one_line, warn
from support.files import whole_file
from support.tokens import N_VOCAB


class DamagedError(UserError):
    """A checkpoint whose archive, checksums or pickle stream can't be read."""


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("ckpt_"))


def find(out_dir: str) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    return sorted((Path(out_dir, name) for name in names if re.fullmatch(r"ckpt_\d+\.pt", name)), key=step_of)


def save(model: torch.nn.Module, optimizer, step: int, config, scaler=None, name: str = "") -> None:
    """Write ckpt_STEP.pt, or one of that name; then delete older ones but the last and those of --keep_every."""
    path = Path(config.out_dir, name or f"ckpt_{step:06d}.pt")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"step {step}: the weights are not finite, so they are not saved: take a lower --max_lr")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
             "GPTConfig": dataclasses.asdict(model.config), "TrainConfig": dataclasses.asdict(config)}  # fmt: skip
    if config.mask_unseen:
        state["token_ids"] = model.token_ids.tolist()
    if scaler and scaler.is_enabled():
        state["scaler"] = scaler.state_dict()
    # On the CPU, so that any machine loads them; tied ones stay tied.
    copies: dict[tuple, torch.Tensor] = {}
    state = tree_map_only(torch.Tensor, lambda t: copies.setdefault((t.data_ptr(), t.shape, t.dtype), t.cpu()), state)
    with whole_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's writer hides the reason, a full disk say, in the context
            raise UserError(f"cannot write {path}: {one_line(error.__context__ or error)}") from None
    # Later ones are damaged, as the run resumed before them: don't count them.
    earlier = [path for path in find(config.out_dir) if step_of(path) <= step]
    for old in earlier[:-2]:
        if not config.keep_every or step_of(old) % config.keep_every:
            old.unlink()


def read(path: Path) -> dict[str, Any]:
    """A checkpoint as saved, on the CPU; no code in it is run. DamagedError if it can't be read."""
    try:
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares the checksums, which torch.load() doesn't
            if damaged:
                raise ValueError(f"{damaged} in it is damaged")
            # build-nanogpt's hold a GPTConfig of its own, whose fields a namespace takes.
            with torch.serialization.safe_globals([(SimpleNamespace, "__main__.GPTConfig")]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle stream raises any of a dozen kinds
        if isinstance(error, MemoryError | PermissionError | FileNotFoundError) or "allocate memory" in str(error):
            raise
        why = one_line(error)
        if isinstance(error, UnpicklingError | zipfile.BadZipFile):  # torch's words advise to run the file's code
            why = "no checkpoint, or one that holds code; weights of `transformers` are named by their folder"
        raise DamagedError(f"cannot read checkpoint {path} ({why}): restore it or move it away") from None
    if isinstance(state, dict) and ("model_args" in state or isinstance(state.get("config"), SimpleNamespace)):
        state = from_nanogpt(path, state)
    if not isinstance(state, dict) or "GPTConfig" not in state:
        raise UserError(f"cannot read checkpoint {path}: train_gpt2.py didn't write it, as it has no GPTConfig")
    return state


def from_nanogpt(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of nanoGPT or build-nanogpt as one of ours, its optimiser aside; UserError if it is no GPT-2."""
    shape = state["model_args"] if "model_args" in state else vars(state["config"])
    vocab_size, bias = shape.get("vocab_size") or 0, shape.get("bias", True)
    if vocab_size < N_VOCAB or not bias:
        what = f"GPT-2 has {N_VOCAB} tokens and biases, this has vocab_size {vocab_size} and bias={bias}"
        raise UserError(f"cannot take weights from {path}: {what}")
    if "model_args" in state:
        warn(f"{path}: nanoGPT computes GELU by erf, this script by tanh, so losses may differ by a few thousandths")
    weights = {re.sub(r"^(_orig_mod\.|module\.)+", "", name): w for name, w in state["model"].items()}
    weights = {name: w for name, w in weights.items() if not name.endswith(".attn.bias")}  # the causal mask
    embedding = weights["transformer.wte.weight"]
    if not torch.equal(weights.setdefault("lm_head.weight", embedding), embedding):
        raise UserError(f"cannot take weights from {path}: its lm_head.weight is not its wte.weight, as GPT-2's is")
    fields = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    return {"GPTConfig": {name: shape[name] for name in fields}, "TrainConfig": {}, "model": weights}


def newest(out_dir: str) -> dict[str, Any] | None:
    """The newest checkpoint of a run that is not damaged; None if there is none at all."""
    found = find(out_dir)
    for path in reversed(found):
        try:
            return read(path)
        except DamagedError as error:
            if path == found[0]:
                raise
            warn(f"{error}; taking the one before it")
    return None


def check_same_run(state: dict[str, Any], gpt_config, config) -> None:
    """Raise UserError, naming the fields, if a run had other settings; without gpt_config, any shape will do."""
    saved = state["GPTConfig"] | state["TrainConfig"]
    # Checkpoints from before --print_every have that order, or name theirs.
    if saved.get("order", "hashed" if "print_every" in saved else "numpy") == "numpy":
        what = f"the run in {config.out_dir} is an older version's, which shuffled in another way"
        raise UserError(f"{what}: give another --out_dir, and --init_from for its weights")
    found, flags, extend = [], [], ""
    for now in (config, gpt_config) if gpt_config else (config,):
        for f in dataclasses.fields(now):
            was, value = saved.get(f.name, f.default), getattr(now, f.name)
            if value == was or not f.metadata["fixed"]:
                continue
            if now is gpt_config and config.init_from != "scratch" and f.name != "block_size":
                continue  # weights of --init_from bring their shape
            if f.name == "max_steps" and value > was:
                if config.extend:
                    continue
                extend = ", --extend to let it grow"
            found.append(f"--{f.name} is {value}, but {was}")
            flags.append(as_flag(f.name, was))
    if found:
        fix = f"give {' '.join(flags)} to resume it{extend}, or another --out_dir"
        raise UserError(f"{'; '.join(found)} in the run in {config.out_dir}: {fix}", status=2)
