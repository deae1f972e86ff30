"""HellaSwag: how often does a model find the right one of four endings?

    python hellaswag.py                            # OpenAI's GPT-2 124M
    python hellaswag.py --model log                # the newest checkpoint

An ending's score is the sum of the log-probabilities of its tokens after the
context. `acc` counts the examples whose right ending has the highest score,
`acc_norm` those where it has the highest over its length. JSON on stdout.
--style completion  context, space, ending; tokens. OpenAI's: 0.2859, 0.2955
--style harness     lm-evaluation-harness' text; characters.  0.2892, 0.3114
"""

import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # which PYTHONSAFEPATH=1 leaves out
from support.cli import Parser, UserError, integer, one_line, run_script, warn  # first: it names the Python it needs

# isort: split
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from support.files import DAMAGE, whole_file
from support.readers import ask_hub, read_rows
from support.tokens import END_OF_TEXT, encode_document
from support.world import World, attention_of_any_length, join_world

DATASET = "Rowan/hellaswag"
FILE = "data/validation-00000-of-00001.parquet"
REVISION = "218ec52e09a7e7462a5400043bb9a69a41d06b76"
FIELDS = {"completion": ("ctx", "endings", "label"),
          "harness": ("activity_label", "ctx_a", "ctx_b", "endings", "label")}  # fmt: skip
BATCH_TOKENS = {"cuda": 16384, "mps": 8192, "cpu": 1024}  # in a batch, with its padding
LOGIT_BYTES = 2**28  # of float32 logits at a time

# ---------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    """Token ids of a context and four endings, their lengths in characters, and which is right."""

    row: int
    context: list[int]
    endings: list[list[int]]
    characters: list[int]
    label: int


def fetch() -> Path:
    """The validation split in the Hub's cache, downloaded if need be, or UserError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries are not worth a line each
    download = partial(hf_hub_download, filename=FILE, repo_type="dataset", revision=REVISION)
    fix = "check the network, or name a local file (--data here, --hellaswag_data in training)"
    return Path(ask_hub(download, DATASET, tries=1, fix=fix))


def check(record: dict, style: str) -> None:
    """Raise ValueError unless a row has the fields of a style, as Rowan/hellaswag has them."""
    lacking = [name for name in FIELDS[style] if record.get(name) is None]
    if lacking:
        raise ValueError(f"the field {lacking[0]} is missing")
    endings = [ending for ending in record["endings"] if isinstance(ending, str) and ending.strip()]
    if len(endings) != 4 or len(record["endings"]) != 4:
        raise ValueError(f"endings are not four strings, none of them empty: {record['endings']!r}")
    if str(record["label"]) not in ("0", "1", "2", "3"):
        raise ValueError(f"label {record['label']!r} is none of 0, 1, 2, 3")


def harness_text(text: str) -> str:
    """A text as lm-evaluation-harness prepares it (0.4.13, lm_eval/tasks/hellaswag/utils.py)."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def make_example(row: int, record: dict, style: str) -> Example:
    """Tokenize a row that check() has passed."""
    context, endings = record.get("ctx"), record["endings"]
    kept = context
    if style == "harness":
        context = harness_text(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}")
        endings = [harness_text(ending) for ending in endings]
        kept = context.rstrip()  # it counts spaces at the context's end as part of the endings
    texts = [kept] + [f"{context[len(kept) :]} {ending}" for ending in endings]
    context_ids, *ending_ids = (encode_document(text)[1:].tolist() for text in texts)  # without <|endoftext|>
    return Example(row, context_ids or [END_OF_TEXT], ending_ids, list(map(len, endings)), int(record["label"]))


def read_examples(source: str, style: str, limit: int | None = None) -> list[Example]:
    """The examples of a .parquet or .jsonl file, or, if that is "", the Hub's; UserError if bad."""
    path, row, examples = Path(source) if source else fetch(), 0, []
    if path.suffix not in (".parquet", ".jsonl") or not path.is_file():
        raise UserError(f"{path} is no .parquet or .jsonl file")
    try:
        for record, _ in islice(read_rows(path, FIELDS[style]), limit):
            if record is not None:  # as an empty line is
                check(record, style)
                examples.append(make_example(row, record, style))
            row += 1
    except DAMAGE as error:
        raise UserError(f"cannot read {path}, row {row} (counted from 0): {one_line(error)}: repair the file") from None
    if not examples:
        raise UserError(f"{path} holds no examples")
    return examples


# ---------------------------------------------------------------- batches


class Batch(NamedTuple):
    """Examples as rows of the same length; pack() gives one alone, (T,) in the place of (B, T)."""

    tokens: Tensor  # (B, T)
    positions: Tensor  # (B, T)
    segments: Tensor  # (B, T): 0 the context, 1 to 4 the endings, -1 padding
    at: Tensor  # (N,): for each token to score, the index in B * T that predicts it,
    targets: Tensor  # (N,): its id,
    endings: Tensor  # (N,): and its ending, 4 * example + 0 to 3


def pack(example: Example, T: int) -> Batch:
    """An example as one row; if it is too long for T, each ending has its own context, cut on the left."""
    context = example.context
    shared = len(context) if len(context) + max(map(len, example.endings)) - 1 <= T else 0
    tokens, positions, segments = context[:shared], list(range(shared)), [0] * shared
    at, targets, endings = [], [], []
    for number, ending in enumerate(example.endings):
        text = (context + ending)[-(T + 1) :]
        scored, end = min(len(ending), len(text) - 1), len(text) - 1  # the last token predicts nothing
        offset = len(tokens) - shared  # beyond what is shared, text[i] goes to i + offset
        at += [i + offset if i >= shared else i for i in range(end - scored, end)]
        targets += text[-scored:]
        endings += [number] * scored
        tokens += text[shared:end]
        positions += range(shared, end)
        segments += [number + 1] * (end - shared)
    return Batch(*map(torch.tensor, (tokens, positions, segments, at, targets, endings)))


class HellaSwag:
    """Examples for models of one shape, in batches of similar lengths; UserError if it lacks a token."""

    def __init__(self, examples: list[Example], style: str, config, device: str = "cpu"):
        self.style = style
        packed = [pack(example, config.block_size) for example in examples]
        largest = max(int(max(row.tokens.max(), row.targets.max())) for row in packed)
        if largest >= config.n_vocab:
            raise UserError(f"HellaSwag has token {largest}, the model knows {config.n_vocab}")
        self.labels = np.array([example.label for example in examples])  # (n,)
        lengths = [example.characters for example in examples]
        if style == "completion":
            lengths = [np.bincount(row.endings, minlength=4) for row in packed]
        self.lengths = np.array(lengths)  # (n, 4)
        self.batches: list[Batch] = []
        pad = partial(pad_sequence, batch_first=True)
        order = sorted(range(len(packed)), key=lambda i: len(packed[i].tokens))
        while order:
            longest = len(packed[order[-1]].tokens)
            n = max(1, BATCH_TOKENS[device] // longest)
            chosen, order = order[-n:], order[:-n]
            rows = [packed[i] for i in chosen]
            batch = Batch(
                tokens=pad([row.tokens for row in rows]),
                positions=pad([row.positions for row in rows]),
                segments=pad([row.segments for row in rows], padding_value=-1),
                at=torch.cat([row.at + b * longest for b, row in enumerate(rows)]),
                targets=torch.cat([row.targets for row in rows]),
                endings=torch.cat([packed[i].endings + 4 * i for i in chosen]),
            )
            self.batches.append(batch)

    def summary(self, scores: np.ndarray) -> dict[str, float | int | str | None]:
        """The JSON object that is reported, from the scores (n, 4) of evaluate()."""
        n, result = len(self.labels), {"style": self.style}
        for name, values in (("acc", scores), ("acc_norm", self.normalized(scores))):
            # Scores that are not numbers are never right, nor are four that are impossible.
            p = result[name] = float(np.mean((values.argmax(1) == self.labels) & np.isfinite(values.max(1))))
            result[f"{name}_stderr"] = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None
        unit = "tokens" if self.style == "completion" else "characters"
        return result | {"normalization": f"{unit} of the ending", "examples": n}

    def normalized(self, scores: np.ndarray) -> np.ndarray:
        """Scores over lengths (n, 4); minus infinity for an ending that the harness leaves empty."""
        return np.divide(scores, self.lengths, out=np.full(scores.shape, -np.inf), where=self.lengths > 0)


def load_or_warn(source: str, config, world: World) -> HellaSwag | None:
    """The examples for training, if every rank could have them; else one warning, and None."""
    why = None
    try:
        data = HellaSwag(read_examples(source, "completion"), "completion", config, world.device.type)
    except (UserError, OSError) as error:
        why = one_line(error)
    if world.any(why):
        warn(f"continuing without HellaSwag: {why or 'another rank lacks it'}")
        return None
    return data


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def score(model, batch: Batch, world: World, buffer: Tensor) -> np.ndarray:
    """The log-probability in nats of each token to score, (N,); buffer (rows, V) is reused."""
    batch = Batch(*(world.move(tensor) for tensor in batch))
    # Each token sees the context and what stands before it in its own ending.
    segments = batch.segments
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # (B, T, T)
    # As attention adds it, with rows of a multiple of 8: else it would be converted in every layer.
    B, T = batch.tokens.shape
    mask = torch.zeros(B, T, math.ceil(T / 8) * 8, dtype=world.dtype, device=world.device)[..., :T]
    mask[~seen.tril()] = -math.inf
    with world.autocast(), attention_of_any_length():
        hidden = model.hidden(batch.tokens, batch.positions, mask[:, None]).flatten(0, 1)  # (B * T, C)
    found = []
    for rows, target in zip(batch.at.split(len(buffer)), batch.targets.split(len(buffer)), strict=True):
        # In float32: where OpenAI's logits lie, bfloat16 has steps of 0.5; in place, to save time.
        logits = torch.mm(hidden[rows].float(), model.lm_head.weight.T, out=buffer[: len(rows)])
        logits[:, model.token_bias < 0] = -math.inf
        wanted, largest = logits.gather(1, target[:, None]), logits.amax(1, keepdim=True)
        found.append(wanted - largest - logits.sub_(largest).exp_().sum(1, keepdim=True).log())
    return torch.cat(found)[:, 0].cpu().numpy()


def evaluate(model, data: HellaSwag, world: World) -> np.ndarray:
    """The scores (n, 4) in nats of all endings, on every rank; each computes some batches."""
    n = len(data.labels)
    scores = np.zeros(4 * n)
    V = model.config.vocab_size
    buffer = torch.empty(max(1, LOGIT_BYTES // (4 * V)), V, device=world.device)
    for batch in world.progress(data.batches[world.rank :: world.size], "HellaSwag"):
        found = score(model, batch, world, buffer)
        scores += np.bincount(batch.endings.numpy(), weights=found, minlength=4 * n)
    return np.array(world.sum(*scores)).reshape(n, 4)


def write_examples(path: Path, examples: list[Example], scores: np.ndarray, normalized: np.ndarray) -> None:
    """One JSON object a line: an example's scores, null where impossible, predictions, label."""
    with whole_file(path) as file:
        for i, example in enumerate(examples):
            entry = {"row": example.row, "label": example.label}
            for name, values in (("", scores[i]), ("_norm", normalized[i])):
                entry[f"scores{name}"] = [x if math.isfinite(x) else None for x in values.tolist()]
                entry[f"prediction{name}"] = int(values.argmax())
            file.write((json.dumps(entry) + "\n").encode())


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> None:
    from train_gpt2 import load_model

    parser = Parser("hellaswag.py", __doc__)
    add = parser.add_argument
    home = os.path.expanduser  # which a shell leaves alone in --data=~/x
    add("--model", default="gpt2", type=home, help="gpt2[-medium, -large, -xl], DIR or FILE (default: gpt2)")
    add("--data", default="", type=home, help="a .parquet or .jsonl file (default: the validation split from the Hub)")
    add("--style", default="completion", choices=list(FIELDS), help="completion or harness (default: completion)")
    add("--limit", type=integer, help="take only the first so many rows")
    add("--per_example", type=home, help="file for one JSON object a line: scores and predictions of an example")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu (default: the first there is)")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"], help="auto: bfloat16 on CUDA")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit} must be at least 1")
    each = args.per_example and Path(args.per_example)
    if each and (not each.parent.is_dir() or (each.exists() and not each.is_file())):
        parser.error(f"--per_example {each}: name a plain file in a folder that is there")
    with join_world(args.device, args.dtype) as world:
        examples = read_examples(args.data, args.style, args.limit)
        model = load_model(args.model).to(world.device)
        data = HellaSwag(examples, args.style, model.config, world.device.type)
        began = time.perf_counter()
        scores = evaluate(model, data, world)
        seconds = round(time.perf_counter() - began, 2)
        if np.isnan(scores).any():
            raise UserError(f"--model {args.model}: a score is not a number, so its weights are damaged")
        if world.is_main:
            print(json.dumps({"model": args.model, **data.summary(scores), "seconds": seconds}), flush=True)
            if each:
                write_examples(each, examples, scores, data.normalized(scores))


if __name__ == "__main__":
    run_script(main, "hellaswag.py")
