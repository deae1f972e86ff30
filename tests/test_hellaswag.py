"""HellaSwag's scores are those of a plain evaluation, from any number of ranks, and of any file something is known."""

import dataclasses
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import (
    CPU,
    TINY,
    assert_same,
    environment,
    losses,
    newest,
    run_forked,
    run_script,
    run_train,
    tiny_flags,
)
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

import hellaswag
from hellaswag import DATASET, FILE, HellaSwag, evaluate, read_examples
from support.cli import UserError, exit_status
from support.log import read_log
from support.tokens import END_OF_TEXT, tokenizer
from support.world import World
from train_gpt2 import GPT, GPTConfig, load_model


def row(activity: str, a: str, b: str, endings: list[str], label: int) -> dict:
    context = f"{a} {b}" if b else a
    return {"activity_label": activity, "ctx_a": a, "ctx_b": b, "ctx": context, "endings": endings, "label": str(label)}


ROWS = [
    row("Roof shingle removal", "A man is sitting on a roof.", "he", ["is using wrap to wrap a pair of skis.",
        "is ripping level tiles off.", "is holding a rubik's cube.", "starts pulling up roofing on a roof."], 3),
    row("Health", "[header] How to rest [title] Lie down. [step] Find  a bed. Then", "", ["[title] Sleep well . [step]",
        "Wake up. [substeps] Now.", "Go [out] there  and run", "[header] No [title] Yes"], 0),
    row("Ice", "SHE Skates on ICE.", "SHE JUMPS ", ["On.", "LOUDLY and Falls", "down", "away from Me"], 2),
    row("Café ñandú", "Der Mann trägt 世界 und 😀.", "élan vital", ["läuft 😀 weiter.", "ißt Brötchen", "世", "né"], 1),
    row("One", "They say", "it", ["yes", "no", "on", "is"], 1),
    row("Long", "word " * 90, "he", ["sat down.", "ran", "jumped over the lazy dog", "fell " * 20], 2),
    row("Longer than the window", "He said", "that", ["a " * 70 + "b", "so " * 80, "no", "I am"], 0),
    row("Just", " ".join(["cat"] * 55), "it", ["a b c d", "sat on a mat", "ran", "so it was at the end of it all"], 3),
    row("", "", "", ["From", "nothing at all.", "on", "the end"], 2),
    row("Spaces", "It ends in a bracket [like this]", "", ["so.", "or so", "not at all", "[all of it]"], 0),
]  # fmt: skip


def write(path, rows) -> str:
    """A file of rows, .jsonl or .parquet, whichever the name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def plain_score(model, context: list[int], ending: list[int]) -> tuple[float, int]:
    """The sum of the log-probabilities of an ending, and of how many tokens; one forward pass, no batch."""
    window = model.config.n_positions
    text = (context + ending)[-(window + 1) :]
    with torch.no_grad():
        log_p = model(torch.tensor([text[:-1]])).logits[0].double().log_softmax(-1)
    n = min(len(ending), len(text) - 1)
    return sum(log_p[i - 1, text[i]].item() for i in range(len(text) - n, len(text))), n


def plain_texts(r: dict, style: str) -> tuple[str, list[str], list[str]]:
    """Context, what follows it, and what acc_norm takes the length of, written down step by step."""
    if style == "completion":
        return r["ctx"], [" " + ending for ending in r["endings"]], r["endings"]

    def clean(text):
        text = text.strip().replace(" [title]", ". ")
        while "[" in text and "]" in text[text.index("[") :]:
            start = text.index("[")
            text = text[:start] + text[text.index("]", start) + 1 :]
        return text.replace("  ", " ")

    b = r["ctx_b"]
    context = clean(f"{r['activity_label']}: {r['ctx_a']} {b[:1].upper()}{b[1:].lower()}")
    endings, spaces = [clean(ending) for ending in r["endings"]], ""
    while context.endswith(" "):
        context, spaces = context[:-1], spaces + " "
    return context, [f"{spaces} {ending}" for ending in endings], endings


@pytest.mark.parametrize("style", ["completion", "harness"])
def test_scores_and_predictions_are_those_of_a_plain_evaluation_through_transformers(pretrained, style, tmp_path):
    theirs, folder = pretrained
    model = GPT.from_pretrained(str(folder))
    data = HellaSwag(read_examples(write(tmp_path / "rows.jsonl", ROWS), style), style, model.config)
    scores = evaluate(model, data, CPU)
    normalized, encode = data.normalized(scores), tokenizer().encode_ordinary
    for r, found, found_norm in zip(ROWS, scores, normalized, strict=True):
        context, endings, texts = plain_texts(r, style)
        before = encode(context) or [END_OF_TEXT]
        expected, counts = zip(*(plain_score(theirs, before, encode(e)) for e in endings), strict=True)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
        lengths = counts if style == "completion" else [len(text) for text in texts]
        wanted = [s / n if n else -np.inf for s, n in zip(expected, lengths, strict=True)]
        np.testing.assert_allclose(found_norm, wanted, rtol=1e-5, atol=1e-4)
        assert (found.argmax(), found_norm.argmax()) == (np.argmax(expected), np.argmax(wanted))


@pytest.mark.parametrize("length", [60, 61, 62, 63, 64, 65])
def test_an_example_that_just_fits_the_window_and_one_that_just_does_not(pretrained, length):
    theirs, folder = pretrained
    endings = [[7, 8, 9], [10], [11, 12], [13, 14, 15]]
    example = hellaswag.Example(0, list(range(100, 100 + length)), endings, [1] * 4, 0)
    data = HellaSwag([example], "completion", GPT.from_pretrained(str(folder)).config)
    assert data.batches[0][1].max() < 64
    (found,) = evaluate(GPT.from_pretrained(str(folder)), data, CPU)
    np.testing.assert_allclose(found, [plain_score(theirs, example.context, e)[0] for e in endings], atol=1e-4)


def test_accuracies_and_their_standard_errors():
    data = HellaSwag(
        [hellaswag.Example(0, [1], [[2]] * 4, [3] * 4, label) for label in (0, 1, 2, 3, 3)], "harness", TINY
    )
    assert data.summary(np.full((5, 4), np.nan))["acc"] == 0
    scores = np.array([[9.0, 1, 1, 1], [1, 9, 1, 1], [1, 1, 9, 1], [9, 1, 1, 1], [9, 1, 1, 1]])
    data.lengths = np.array([[1, 1, 1, 1]] * 4 + [[100, 1, 1, 0.1]])
    found = data.summary(scores)
    assert (found["acc"], found["acc_norm"], found["examples"], found["style"]) == (0.6, 0.8, 5, "harness")
    assert found["acc_stderr"] == pytest.approx(np.std([1, 1, 1, 0, 0], ddof=1) / 5**0.5)
    assert found["acc_norm_stderr"] == pytest.approx(np.std([1, 1, 1, 0, 1], ddof=1) / 5**0.5)
    assert found["normalization"] == "characters of the ending"


# ---------------------------------------------------------------- work and memory


def random_examples(n: int, longest: int) -> list[hellaswag.Example]:
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(0, 96, n).tolist()  # noqa: E731
    lengths = rng.integers(1, longest, (n, 5))
    return [hellaswag.Example(i, ids(row[0]), [ids(m) for m in row[1:]], [1] * 4, 0) for i, row in enumerate(lengths)]


def test_a_context_is_run_once_and_logits_are_made_for_scored_tokens_only():
    examples = random_examples(30, 8)
    data = HellaSwag(examples, "completion", TINY)
    run = sum(int((batch[2] >= 0).sum()) for batch in data.batches)
    assert run == sum(len(e.context) + sum(len(ending) - 1 for ending in e.endings) for e in examples)
    with FlopCounterMode(display=False) as counter:
        evaluate(GPT(TINY), data, CPU)
    scored = sum(len(ending) for e in examples for ending in e.endings)
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == 2 * scored * TINY.n_embd * TINY.vocab_size


def test_batches_keep_to_their_tokens_and_lose_few_to_padding():
    examples = random_examples(600, 40)
    data = HellaSwag(examples, "completion", dataclasses.replace(TINY, block_size=128))
    sizes = [batch[0].numel() for batch in data.batches]
    assert 0.8 * hellaswag.BATCH_TOKENS["cpu"] < np.mean(sizes) <= max(sizes) <= hellaswag.BATCH_TOKENS["cpu"]
    assert sum(int((batch[2] < 0).sum()) for batch in data.batches) < 0.1 * sum(sizes)
    assert sorted(i for batch in data.batches for i in set((batch[5] // 4).tolist())) == list(range(600))


def test_an_example_longer_than_a_batch_goes_alone_and_is_scored(monkeypatch):
    examples = random_examples(20, 12)
    whole = evaluate(GPT(TINY), HellaSwag(examples, "completion", TINY), CPU)
    monkeypatch.setitem(hellaswag.BATCH_TOKENS, "cpu", 16)
    data = HellaSwag(examples, "completion", TINY)
    assert len(data.batches) == 20
    np.testing.assert_allclose(evaluate(GPT(TINY), data, CPU), whole, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- alone, from the command line


@pytest.fixture
def alone(capsys):
    """hellaswag.py within this process: its exit status, stdout and stderr."""

    def run(model, data, *flags):
        argv = [str(a) for a in ("--model", model, "--device", "cpu", "--data", data, *flags)]
        status = exit_status(lambda: hellaswag.main(argv), "hellaswag.py")
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_one_json_line_on_stdout_and_one_an_example_in_a_file(pretrained, tmp_path, alone, suffix):
    data = write(tmp_path / f"rows.{suffix}", ROWS)
    status, out, err = alone(pretrained[1], data, "--per_example", tmp_path / "each.jsonl")
    assert status == 0, err
    found = json.loads(out)
    assert list(found) == ["model", "style", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "normalization",
                           "examples", "seconds"]  # fmt: skip
    assert (found["style"], found["examples"], found["normalization"]) == (
        "completion",
        len(ROWS),
        "tokens of the ending",
    )
    assert 0 < found["seconds"] < 600
    each = [json.loads(line) for line in (tmp_path / "each.jsonl").read_text().splitlines()]
    assert [e["label"] for e in each] == [int(r["label"]) for r in ROWS]
    assert [e["row"] for e in each] == list(range(len(ROWS)))
    assert found["acc"] == np.mean([e["prediction"] == e["label"] for e in each])
    assert found["acc_norm"] == np.mean([e["prediction_norm"] == e["label"] for e in each])
    assert all(np.argmax(e["scores"]) == e["prediction"] for e in each)


def test_limit_takes_the_first_examples_and_style_is_heeded(pretrained, tmp_path, alone, monkeypatch):
    data = write(tmp_path / "rows.jsonl", ROWS)
    each = tmp_path / "each.jsonl"
    monkeypatch.setenv("HOME", str(tmp_path))
    _, out, _ = alone(pretrained[1], data, "--limit", "2e0", "--style", "harness", "--per_example=~/each.jsonl")
    assert json.loads(out)["examples"] == 2
    assert json.loads(out)["normalization"] == "characters of the ending"
    assert [json.loads(line)["row"] for line in each.read_text().splitlines()] == [0, 1]


def test_an_ending_of_which_the_harness_leaves_nothing_is_never_chosen(pretrained, tmp_path, alone):
    data = write(tmp_path / "rows.jsonl", ROWS[-1:])
    status, out, err = alone(pretrained[1], data, "--style", "harness", "--per_example", tmp_path / "each.jsonl")
    assert status == 0, err
    entry = json.loads((tmp_path / "each.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert entry["scores_norm"][3] is None
    assert entry["prediction_norm"] != 3
    assert json.loads(out)["acc_stderr"] is None  # of a single example


def test_on_a_terminal_a_bar_shows_how_far_it_is(pretrained, tmp_path, alone, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    # At once, not after five seconds.
    monkeypatch.setattr("support.world.tqdm", lambda *args, **how: tqdm(*args, **how | {"delay": 0, "mininterval": 0}))
    *_, err = alone(pretrained[1], write(tmp_path / "rows.jsonl", ROWS * 12))
    done, batches = re.findall(r"HellaSwag: .*?(\d+)/(\d+) \[", err)[-1]
    assert 0 < int(done) <= int(batches)


def test_one_rank_and_two_give_the_same_scores_to_the_bit(pretrained, tmp_path):
    data = write(tmp_path / "rows.jsonl", ROWS * 12)  # several batches
    results = []
    for ranks in (1, 2):
        each = tmp_path / f"each_{ranks}.jsonl"
        flags = ["--model", pretrained[1], "--device", "cpu", "--data", data, "--per_example", each]
        result = run_forked(["hellaswag", *flags], tmp_path, ranks=ranks)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("\n") == 1
        results.append((each.read_bytes(), {**json.loads(result.stdout), "seconds": None}))
    assert results[0] == results[1]


@pytest.mark.parametrize("what", ["file", "best.pt", "ckpt_best.pt", "folder"])
def test_a_checkpoint_a_renamed_one_and_the_folder_of_a_run_are_models(shards, tmp_path, alone, what):
    assert run_train(tiny_flags(shards, tmp_path / "log", vocab_size=50304, max_steps=4, eval_every=0)) == 0
    source = tmp_path / "log"
    if what == "file":
        source = tmp_path / "log" / "ckpt_000004.pt"
    elif what != "folder":
        source = (tmp_path / "log" / "ckpt_000004.pt").rename(tmp_path / what)
    else:
        assert_same(dict(load_model(str(source)).state_dict()), dict(newest(source)["model"]))
    status, out, err = alone(source, write(tmp_path / "rows.jsonl", ROWS))
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["model"] == str(source)


# ---------------------------------------------------------------- what is not as it should be


def changed(**fields) -> list[dict]:
    return [ROWS[0], ROWS[1] | fields]


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("rows.jsonl", changed(label="4"), "row 1 .*label '4'"),
        ("rows.jsonl", changed(label=""), "row 1 .*label ''"),
        ("rows.jsonl", changed(endings=["a", "b", " ", "d"]), "row 1 .*none of them empty"),
        ("rows.jsonl", changed(endings=["a", "b", "c"]), "row 1 .*not four strings"),
        ("rows.jsonl", changed(endings=["a", "b", "c", 4]), "row 1 .*not four strings"),
        ("rows.jsonl", changed(ctx=None), "row 1 .*field ctx is missing"),
        ("rows.jsonl", [ROWS[0], {}], "row 1 .*field ctx is missing"),
        ("rows.parquet", [ROWS[0], dict.fromkeys(ROWS[0])], "row 1 .*field ctx is missing"),
        ("rows.jsonl", changed(ctx=["a"]), "row 1 "),
        ("rows.jsonl", [ROWS[0], {"ctx": "x"}], "row 1 .*field endings is missing"),
        ("rows.jsonl", [ROWS[0], ["a"]], "row 1 "),
        ("rows.jsonl", [], "no examples"),
        ("rows.parquet", [{k: v for k, v in ROWS[0].items() if k != "endings"}], "no field named endings"),
        ("rows.parquet", changed(label="7"), "row 1 .*label '7'"),
        ("rows.parquet", changed(label=None), "row 1 .*field label is missing"),
        ("rows.txt", ROWS, "no .parquet or .jsonl file"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_in_one_line(tmp_path, name, rows, said):
    path = write(tmp_path / name, rows)
    with pytest.raises(UserError, match=said) as error:
        read_examples(path, "completion")
    assert path in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html>\n<html><body>451</body></html>\n", b"", b"PAR1\0\0PAR1", b"\xff\xfe"]
)
def test_what_is_no_dataset_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"row 0|no examples"):
        read_examples(str(path), "completion")


def test_labels_may_be_numbers_and_empty_lines_are_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(ROWS[0] | {"label": 2}) + "\n\n")
    (example,) = read_examples(str(path), "completion")
    assert (example.row, example.label) == (1, 2)


@pytest.mark.parametrize(
    ("flags", "said", "status"),
    [
        (["--style", "best"], "invalid choice: 'best'", 2),
        (["--limit", 0], "--limit 0 must be at least 1", 2),
        (["--limit", -1], "--limit -1 must be at least 1", 2),
        (["--limits", 5], "unrecognized arguments: --limits 5", 2),
        (["--dtype", "half"], "invalid choice: 'half'", 2),
        (["--device", "gpu"], "--device gpu", 2),
        (["--data", "nothing.jsonl"], "nothing.jsonl is no .parquet or .jsonl file", 1),
        (["--model", "nothing"], "no checkpoint in nothing, nor what `transformers` saves", 1),
        (["--model", "rows.jsonl"], "cannot read checkpoint rows.jsonl (no checkpoint, or one that holds code;", 1),
        (["--per_example", "no/folder/each.jsonl"], "--per_example no/folder/each.jsonl: name a plain file", 2),
        (["--per_example", "/dev/null"], "--per_example /dev/null: name a plain file", 2),
    ],
)
def test_a_bad_flag_ends_in_one_line(pretrained, tmp_path, monkeypatch, alone, flags, said, status):
    monkeypatch.chdir(tmp_path)
    found, out, err = alone(pretrained[1], write(tmp_path / "rows.jsonl", ROWS), *flags)
    assert (found, out) == (status, "")
    assert said in err.splitlines()[-1]


@pytest.mark.parametrize("place", ["context", "ending"])
def test_a_token_that_the_model_lacks_is_refused(place):
    context, ending = ([96], [1]) if place == "context" else ([1], [1, 96])
    with pytest.raises(UserError, match="token 96, the model knows 96"):
        HellaSwag([hellaswag.Example(0, context, [ending] * 4, [1] * 4, 0)], "completion", TINY)


def test_broken_weights_are_refused(tmp_path, alone):
    write(tmp_path / "rows.jsonl", ROWS)
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=16, n_layer=1, n_head=2))
    torch.nn.init.constant_(theirs.transformer.ln_f.weight, torch.nan)
    theirs.save_pretrained(tmp_path / "hf")
    status, out, err = alone(tmp_path / "hf", tmp_path / "rows.jsonl")
    assert (status, out) == (1, "")
    assert "a score is not a number" in err.splitlines()[-1]


# ---------------------------------------------------------------- from the Hub


def fetch(hub, folder):
    program = folder / "fetch.py"
    program.write_text(
        "import hellaswag, support.cli\nsupport.cli.run_script(lambda: print(hellaswag.fetch()), 'hellaswag.py')\n"
    )
    return run_script([program], env=environment(hub, folder))


def test_the_validation_split_is_fetched_once(hub, tmp_path):
    write(tmp_path / "rows.parquet", ROWS)
    hub.datasets[DATASET] = {FILE: (tmp_path / "rows.parquet").read_bytes()}
    first = fetch(hub, tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert len(read_examples(first.stdout.strip(), "harness")) == len(ROWS)
    assert hub.asked["GET", f"/datasets/{DATASET}/resolve/{hellaswag.REVISION}/{FILE}"] == 1
    hub.datasets[DATASET] = {}
    assert fetch(hub, tmp_path).stdout == first.stdout  # from the cache


# ---------------------------------------------------------------- in training


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_compile_validation_hellaswag_and_sampling_work_in_one_run(shards, tmp_path, alone, ranks):
    data = write(tmp_path / "rows.jsonl", ROWS * 12)
    flags = tiny_flags(shards, tmp_path / "log", vocab_size=50304, compile=True, sample_every=3, max_length=9,
                       hellaswag_every=3, hellaswag_data=data)  # fmt: skip
    result = run_forked(["train_gpt2", *flags], tmp_path, ranks=ranks)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    log = read_log(tmp_path / "log" / "log.jsonl")
    assert list(log["hellaswag"]) == list(log["val"]) == [0, 3, 6]
    assert result.stdout.count("HellaSwag acc_norm") == 3
    assert result.stdout.count("sample: !") == 8
    again = json.loads(alone(tmp_path / "log", data)[1])
    for name in ("acc", "acc_norm", "examples"):
        assert log["hellaswag"][6][name] == again[name]
    assert (tmp_path / "log" / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_without_the_data_there_is_one_warning_and_training_goes_on(shards, tmp_path, hub, ranks):
    hub.datasets[DATASET] = {}
    flags = tiny_flags(shards, tmp_path / "log", hellaswag_every=3)
    result = run_script(["train_gpt2.py", *flags], ranks=ranks, env=environment(hub, tmp_path))
    assert result.returncode == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if "HellaSwag" in line or "Hub" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: continuing without HellaSwag: the Hub: ")
    assert warnings[0].endswith("--hellaswag_data in training)")
    log = read_log(tmp_path / "log" / "log.jsonl")
    assert list(log["train"]) == [1, 2, 3, 4, 5, 6]
    assert "hellaswag" not in log


def test_if_only_the_other_rank_lacks_the_data_both_go_on_without(tmp_path, capsys):
    class Other(World):
        def any(self, value):  # whatever this rank says
            return True

    data, config = write(tmp_path / "rows.jsonl", ROWS), GPTConfig()
    assert hellaswag.load_or_warn(data, config, CPU) is not None
    assert hellaswag.load_or_warn(data, config, Other(0, 2, CPU.device, CPU.dtype)) is None
    assert capsys.readouterr().err == "warning: continuing without HellaSwag: another rank lacks it\n"


@pytest.mark.picture
@pytest.mark.filterwarnings("error:No artists")  # in the picture, when there is no loss yet
def test_hellaswag_leaves_the_losses_as_they_were(shards, tmp_path):
    data = write(tmp_path / "rows.jsonl", ROWS)
    for every in (0, 2):
        flags = tiny_flags(
            shards, tmp_path / f"log_{every}", vocab_size=50304, hellaswag_every=every, save_every=0, eval_every=0
        )
        assert run_train([*flags, "--hellaswag_data", data]) == 0
    assert losses(tmp_path / "log_0") == losses(tmp_path / "log_2")
