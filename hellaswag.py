"""HellaSwag: how often does a model find the right one of four endings?

    python hellaswag.py                                      # OpenAI's GPT-2 124M
    python hellaswag.py --model log                          # the newest checkpoint of train_gpt2.py
    python hellaswag.py --model log --style harness          # a number to compare with lm-evaluation-harness
    torchrun --nproc_per_node=8 hellaswag.py --model log     # the same numbers from eight GPUs

An ending's score is the sum of the log-probabilities of its tokens after the context. `acc` counts the examples whose
right ending has the highest score, `acc_norm` those where it has the highest score over its length. Two styles:

    completion    the context, a space, the ending; length in tokens. OpenAI's GPT-2 124M: acc 0.2859, acc_norm 0.2955
    harness       texts and length (in characters) of lm-evaluation-harness.               acc 0.2892, acc_norm 0.3114

The last line, on stdout, is a JSON object. train_gpt2.py calls evaluate() while it trains.
"""

import hashlib
import json
import math
import re
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import fineweb
from support.cli import Parser, UserError, one_line, run_script
from support.files import DAMAGE, whole_file
from support.tokens import END_OF_TEXT, encode_document
from support.world import World, join_world

if TYPE_CHECKING:
    from train_gpt2 import GPT, GPTConfig

DATASET = "Rowan/hellaswag"
FILE = "data/validation-00000-of-00001.parquet"
REVISION = "218ec52e09a7e7462a5400043bb9a69a41d06b76"
SHA256 = "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd"
FIELDS = {
    "completion": ("ctx", "endings", "label"),
    "harness": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
}
UNIT = {"completion": "tokens of the ending", "harness": "characters of the ending"}
BATCH_TOKENS = {"cuda": 16384, "mps": 8192, "cpu": 1024}  # in a batch, with its padding
LOGIT_ROWS = 768  # at a time: 155 MB in float32, and no fewer than a batch on a CPU usually needs

# ---------------------------------------------------------------- examples


@dataclass(frozen=True)
class Example:
    """Token ids of a context and its four endings, the endings' lengths in characters, and which one is right."""

    row: int
    context: list[int]
    endings: list[list[int]]
    characters: list[int]
    label: int


def fetch(sha256: str = SHA256) -> Path:
    """The validation split in the Hub's cache, downloaded if need be; UserError if it can't be had or is another."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # its retries are not worth a line each
    download = partial(hf_hub_download, DATASET, FILE, repo_type="dataset", revision=REVISION)
    mend = "check the network, or name a local file (--data here, --hellaswag_data in training)"
    path = Path(fineweb.ask_hub(download, tries=1, mend=mend))
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise UserError(f"{path.resolve()} has the SHA-256 {found}, not {sha256}: delete it and try again")
    return path


def check(record: dict, style: str) -> None:
    """Raise ValueError unless a row has the fields of a style, with values that they can have."""
    if not isinstance(record, dict):
        raise ValueError(f"it is {type(record).__name__}, not an object")
    for name in FIELDS[style]:
        if record.get(name) is None:
            raise ValueError(f"the field {name} is missing")
        if name not in ("endings", "label") and not isinstance(record[name], str):
            raise ValueError(f"{name} is not a string: {record[name]!r}")
    endings, label = record["endings"], record["label"]
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(e, str) and e.strip() for e in endings):
        raise ValueError(f"endings are not four strings, none of them empty: {endings!r}")
    if str(label) not in ("0", "1", "2", "3"):
        raise ValueError(f"label {label!r} is none of 0, 1, 2, 3")


def harness_text(text: str) -> str:
    """A text as lm-evaluation-harness prepares it (0.4.13, lm_eval/tasks/hellaswag/utils.py)."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def make_example(row: int, record: dict, style: str) -> Example:
    """Tokenize a row that check() has passed."""
    context, endings = record.get("ctx"), record["endings"]
    if style == "harness":
        context = harness_text(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}")
        endings = [harness_text(e) for e in endings]
    # The harness counts spaces at the context's end as part of the endings.
    kept = context.rstrip() if style == "harness" else context
    tokens = [encode_document(text) for text in (kept, *(f"{context[len(kept) :]} {e}" for e in endings))]
    context_ids, *ending_ids = (ids[1:].tolist() for ids in tokens)  # without the <|endoftext|> before a document
    return Example(row, context_ids or [END_OF_TEXT], ending_ids, [*map(len, endings)], int(record["label"]))


def read_examples(source: str, style: str, limit: int | None = None) -> list[Example]:
    """The examples of a .parquet or .jsonl file, or, if that is "", of the validation split on the Hub.

    Raises UserError, with the row, for what is not as it should be.
    """
    path, row, examples = Path(source) if source else fetch(), 0, []
    if path.suffix not in (".parquet", ".jsonl") or not path.is_file():
        raise UserError(f"{path} is no .parquet or .jsonl file")
    try:
        for record, _ in islice(fineweb.read_rows(path, FIELDS[style]), limit):
            if record is not None:  # as an empty line is
                check(record, style)
                examples.append(make_example(row, record, style))
            row += 1
    except DAMAGE as error:
        raise UserError(f"cannot read {path}, row {row} (counted from 0): {one_line(error)}: mend the file") from None
    if not examples:
        raise UserError(f"{path} holds no examples")
    return examples


# ---------------------------------------------------------------- batches

# Token ids, positions and segments (B, T); where in B * T a token is predicted, which, and for which ending, (N,) each.
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def pack(example: Example, T: int) -> tuple[list[list[int]], list[list[int]]]:
    """An example as one row: the context as segment 0, then its endings as segments 1 to 4, side by side.

    Returns tokens, positions and segments; and, for each token to score, the index in the row that predicts it, its
    id, and its ending, 0 to 3. An ending whose text doesn't fit in T positions loses its beginning; then nothing is
    shared, and each segment is a text of its own.
    """
    context, endings = example.context, example.endings
    shared = len(context) if len(context) + max(map(len, endings)) - 1 <= T else 0
    tokens, positions, segments = context[:shared], [*range(shared)], [0] * shared
    at, targets, of = [], [], []
    for number, ending in enumerate(endings):
        text = (context + ending)[-(T + 1) :]
        scored = min(len(ending), len(text) - 1)
        offset, end = len(tokens) - shared, len(text) - 1  # text[i] goes to i + offset; the last token predicts nothing
        at += [i + offset if i >= shared else i for i in range(end - scored, end)]
        targets += text[-scored:]
        of += [number] * scored
        tokens += text[shared:end]
        positions += range(shared, end)
        segments += [number + 1] * (end - shared)
    return [tokens, positions, segments], [at, targets, of]


class HellaSwag:
    """Examples made ready for models of one shape: batches of similar lengths, of BATCH_TOKENS tokens.

    Only an example that alone is longer makes a larger batch. Raises UserError if the model lacks a token.
    """

    def __init__(self, examples: list[Example], style: str, config: "GPTConfig", device: str = "cpu"):
        self.style = style
        packed = [pack(example, config.block_size) for example in examples]
        if (largest := max(max(row[0] + scored[1]) for row, scored in packed)) >= config.n_vocab:
            raise UserError(f"HellaSwag has token {largest}, the model knows {config.n_vocab}")
        self.labels = np.array([example.label for example in examples])  # (n,)
        tokens = [np.bincount(of, minlength=4) for _, (_, _, of) in packed]
        self.lengths = np.array(tokens if style == "completion" else [e.characters for e in examples])  # (n, 4)
        self.batches: list[Batch] = []
        order = sorted(range(len(packed)), key=lambda i: len(packed[i][0][0]))
        while order:
            # From the longest on: as many as fit beside it.
            longest = len(packed[order[-1]][0][0])
            n = max(1, BATCH_TOKENS[device] // longest)
            chosen, order = order[-n:], order[:-n]
            rows = torch.zeros(3, len(chosen), longest, dtype=torch.int64)
            rows[2], scored = -1, []  # the padding's segment
            for b, i in enumerate(chosen):
                row, wanted = map(torch.tensor, packed[i])
                rows[:, b, : row.size(1)] = row
                scored.append(wanted + torch.tensor([[b * longest], [0], [4 * i]]))
            self.batches.append((*rows, *torch.cat(scored, dim=1)))

    def summary(self, scores: np.ndarray) -> dict[str, float | int | str | None]:
        """The JSON object that is reported, from the scores (n, 4) of evaluate()."""
        n, result = len(self.labels), {"style": self.style}
        for name, values in (("acc", scores), ("acc_norm", self.normalized(scores))):
            # Scores that are not numbers are never right, nor is an ending among four that are impossible.
            p = result[name] = float(np.mean((values.argmax(1) == self.labels) & np.isfinite(values.max(1))))
            result[f"{name}_stderr"] = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None
        return result | {"normalization": UNIT[self.style], "examples": n}

    def normalized(self, scores: np.ndarray) -> np.ndarray:
        """Scores over lengths (n, 4); minus infinity for an ending that the harness's preparation leaves empty."""
        return np.divide(scores, self.lengths, out=np.full(scores.shape, -np.inf), where=self.lengths > 0)


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def score(model: "GPT", batch: Batch, world: "World", buffer: Tensor) -> np.ndarray:
    """The log-probability in nats of each token to score, (N,) float32; buffer (rows, V) float32 is scratch space."""
    tokens, positions, segments, at, targets = (world.move(z) for z in batch[:5])
    # Each token sees the context and what stands before it in its own ending.
    seen = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # (B, T, T)
    with world.autocast():
        hidden = model.hidden(tokens, positions, seen.tril()[:, None]).flatten(0, 1)  # (B * T, C)
    found = []
    for rows, target in zip(at.split(len(buffer)), targets.split(len(buffer)), strict=True):
        # Not in bfloat16, which has steps of 0.5 where OpenAI's logits lie; in place, as fresh memory costs time.
        logits = torch.mm(hidden[rows].float(), model.lm_head.weight.T, out=buffer[: len(rows)])
        logits[:, model.token_bias < 0] = -math.inf
        wanted, largest = logits.gather(1, target[:, None]), logits.amax(1, keepdim=True)
        found.append(wanted - largest - logits.sub_(largest).exp_().sum(1, keepdim=True).log())
    return torch.cat(found)[:, 0].cpu().numpy()


def evaluate(model: "GPT", data: HellaSwag, world: "World", progress: bool = False) -> np.ndarray:
    """The scores (n, 4) in nats of all endings, on every rank; the batches are dealt out to the ranks."""
    from tqdm import tqdm

    n, scores, done = len(data.labels), np.zeros(4 * len(data.labels)), np.zeros(len(data.labels), dtype=bool)
    mine = data.batches[world.rank :: world.size]
    buffer = torch.empty(LOGIT_ROWS, model.config.vocab_size, device=world.device)
    quiet = None if progress and world.is_main else True  # None is tqdm's way to say: unless it is no terminal
    with tqdm(total=sum(len(batch[0]) for batch in mine), unit="example", disable=quiet, dynamic_ncols=True) as bar:
        for batch in mine:
            answers = batch[5].numpy()
            scores += np.bincount(answers, weights=score(model, batch, world, buffer), minlength=4 * n)
            done[answers // 4] = True
            if not bar.disable:
                right = data.normalized(scores.reshape(n, 4)).argmax(1) == data.labels
                bar.set_postfix(acc_norm=f"{right[done].mean():.4f}", refresh=False)
            bar.update(len(batch[0]))
    return np.array(world.sum(*scores)).reshape(n, 4)


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> None:
    from train_gpt2 import TrainConfig, load_model

    parser = Parser(prog="hellaswag.py", description=__doc__)
    for name, kind, default, text in [
        ("model", str, "gpt2", "gpt2[-medium, -large, -xl], a folder saved by transformers, a checkpoint of "
         "train_gpt2.py or the folder of its checkpoints (default: gpt2)"),
        ("data", str, "", "a local .parquet or .jsonl file (default: the validation split from the Hub)"),
        ("style", str, "completion", "completion or harness (default: completion)"),
        ("limit", int, None, "take only the first so many rows"),
        ("per_example", Path, None, "file for one JSON object a line: scores, predictions and label of an example"),
        ("device", str, "auto", "cuda, cuda:1, mps or cpu (default: the first there is)"),
        ("dtype", str, "auto", "bfloat16 or float32 (default: bfloat16 on CUDA, else float32)"),
    ]:  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="X", help=text)
    args = parser.parse_args(argv)
    if args.style not in FIELDS:
        parser.error(f"--style {args.style} must be completion or harness")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit} must be at least 1")
    each = args.per_example
    if each and (not each.parent.is_dir() or each.is_symlink() or (each.exists() and not each.is_file())):
        parser.error(f"--per_example {each}: name a plain file in a folder that is there")
    try:
        config = TrainConfig(device=args.device, dtype=args.dtype)
    except ValueError as error:
        parser.error(str(error))
    with join_world(config) as world:
        examples = read_examples(args.data, args.style, args.limit)
        model = load_model(args.model).to(world.device)
        data = HellaSwag(examples, args.style, model.config, world.device.type)
        began = time.perf_counter()
        scores = evaluate(model, data, world, progress=True)
        seconds = time.perf_counter() - began
        if np.isnan(scores).any():
            raise UserError(f"--model {args.model}: a score is not a number, so its weights are damaged")
        if not world.is_main:
            return
        print(json.dumps({"model": args.model} | data.summary(scores) | {"seconds": round(seconds, 2)}), flush=True)
        if each:
            with whole_file(each) as file:
                for example, *both in zip(examples, scores, data.normalized(scores), strict=True):
                    entry = {"row": example.row, "label": example.label}
                    for name, values in zip(("", "_norm"), both, strict=True):
                        # An impossible ending has null: JSON has no infinity.
                        entry[f"scores{name}"] = [x if math.isfinite(x) else None for x in values.tolist()]
                        entry[f"prediction{name}"] = int(values.argmax())
                    file.write((json.dumps(entry) + "\n").encode())


if __name__ == "__main__":
    run_script(main, "hellaswag.py")
