"""Whatever the flags, the prompt or the rows are: success, or one line and a status, and in time."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import assert_one_line, run_forked, run_train, tiny_flags, write_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_untrusted import ROWS

pytestmark = pytest.mark.slow

SLOW = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}
ABSURD = st.sampled_from(["", "-1", "0", "1e309", "nan", "inf", "-inf", "1.5", "x", "🐍", "٣", "-",
                          "99999999999999999999", "4294967295", "4294967296", "2147483648", "1e-320", "True", "None",
                          " 7 ", "0x10"])  # fmt: skip
WORDS = st.text(max_size=30).filter(lambda text: "\0" not in text and "/" not in text)


HUGE = {"4294967295", "2147483648"}  # which are valid, and would take for ever, as steps


def numbers(*sensible: float, huge: bool = True):
    """A few values that may well be meant, and some that can't be."""
    return st.one_of(st.sampled_from([*map(str, sensible)]), ABSURD.filter(lambda text: huge or text not in HUGE))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Shards, rows, texts, and a finished run."""
    folder = tmp_path_factory.mktemp("place")
    write_shards(write_shards(folder / "data", [200], split="val"), [130, 97, 111])
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("One two three four five six seven.\n" * 50)
    assert run_train(tiny_flags(folder / "data", folder / "run", vocab_size=50304, hellaswag_every=0)) == 0
    return folder


TRAIN = {
    "seed": numbers(1, 2), "device": st.sampled_from(["cpu", "cuda", "cuda:7", "mps", "auto", "tpu", "cpu:1", ""]),
    "dtype": st.sampled_from(["auto", "bfloat16", "float32", "float16", "int8", ""]),
    "block_size": numbers(8, 16, 1, 400), "vocab_size": numbers(96, 97, 50304), "n_layer": numbers(1, 2, huge=False),
    "n_head": numbers(1, 2, 3), "n_embd": numbers(16, 8, 1, 6), "max_steps": numbers(0, 1, 2, 3, huge=False),
    "warmup_steps": numbers(0, 1, 2), "max_lr": numbers(1e-3, 1.0, 1e30), "min_lr": numbers(0, 1e-4, 1e30),
    "optimizer": st.sampled_from(["adamw", "muon", "sgd", ""]), "decay": st.sampled_from(["cosine", "linear", ""]),
    "embedding_lr": numbers(1, 0, 2), "init_std": numbers(0.02, 0, 1e30), "weight_decay": numbers(0.1, 0, 1e30),
    "grad_clip": numbers(1, 0, 1e-30),
    "batch_tokens": numbers(128, 64, 96, huge=False), "micro_batch": numbers(1, 2, 4, 8),
    "batch_ramp_steps": numbers(0, 2, huge=False), "batch_ramp_from": numbers(16, 32),
    "val_tokens": numbers(16, 160), "eval_every": numbers(0, 1, 2), "hellaswag_every": numbers(0, 2),
    "hellaswag_data": st.sampled_from(["rows.jsonl", "data", "nowhere.jsonl", "x" * 300]),
    "sample_every": numbers(0, 1), "save_every": numbers(0, 1, 2), "keep_every": numbers(0, 2),
    "num_samples": numbers(1, 3), "max_length": numbers(4, 20), "top_k": numbers(1, 5, 96),
    "temperature": numbers(0, 1, 1e-300, 1e300),
    "prompt": WORDS,
    "init_from": st.sampled_from(["scratch", "run", "run/ckpt_000006.pt", "nowhere", "data", "rows.jsonl", ""]),
    "out_dir": st.sampled_from(["new", "log", "data", "rows.jsonl", "rows.jsonl/log", "", "é\n", "x" * 300]),
    "data_dir": st.sampled_from(["data", "texts", "log", "nowhere", "", "rows.jsonl"]),
}  # fmt: skip
SWITCHES = st.sampled_from(["--mask_unseen", "--no-resume", "--extend", "--no-compile", "--sample", "--export=exported",
                            "--export=data", "--frobnicate", "--max", "word", "--sample=1", "--"])  # fmt: skip


def command(flags: dict[str, str], switches: list[str]) -> list[str]:
    return [*(f"--{name}={value}" for name, value in flags.items()), *switches]


def end_well(script: str, argv: list[str], place: Path) -> None:
    """Run a script in a copy of the place, and see that it ends in success or in one line."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(place, copy, ignore=lambda *_: ["run"])
        (copy / "run").symlink_to(place / "run")
        assert_one_line(run_forked([script, *argv], Path(folder), cwd=str(copy)))


@settings(max_examples=260, **SLOW)
@given(flags=st.dictionaries(st.sampled_from([*TRAIN]), st.none(), max_size=6), switches=st.lists(SWITCHES, max_size=2),
       data=st.data())  # fmt: skip
def test_training_with_any_flags_ends_well(place, flags, switches, data):
    base = dict(arg.removeprefix("--").split("=") for arg in
                "data_dir=data out_dir=new device=cpu block_size=16 vocab_size=96 n_layer=1 n_head=2 n_embd=16 "
                "max_steps=2 warmup_steps=1 batch_tokens=128 micro_batch=4 val_tokens=160 eval_every=2 "
                "hellaswag_every=0 sample_every=0 save_every=1 prompt=! top_k=5 max_length=8".split())  # fmt: skip
    drawn = {name: data.draw(TRAIN[name], label=name) for name in flags}
    end_well("train_gpt2", command(base | drawn, ["--no-compile", *switches]), place)


@settings(max_examples=120, **SLOW)
@given(prompt=st.text(max_size=200).filter(lambda text: "\0" not in text), number=numbers(1, 2),
       length=numbers(8, 40, 250), top_k=numbers(1, 50, 50257), temperature=numbers(0, 1, 1e-300, 1e300))  # fmt: skip
def test_sampling_with_any_prompt_ends_well(place, prompt, number, length, top_k, temperature):
    flags = {"prompt": prompt, "num_samples": number, "max_length": length, "top_k": top_k, "temperature": temperature}
    end_well("train_gpt2", command(flags | {"out_dir": str(place / "run"), "device": "cpu"}, ["--sample"]), place)


FINEWEB = {
    "out_dir": st.sampled_from(["new", "data", "texts", "rows.jsonl", "", "x" * 300]),
    "dataset": st.sampled_from(["texts", "data", "nowhere", "rows.jsonl", "", ".", "..", "a/b/c"]),
    "subset": st.sampled_from(["", "..", "a", "/etc"]), "revision": WORDS, "shard_tokens": numbers(100, 1000, 1),
    "max_tokens": numbers(2, 100, 10_000), "workers": st.sampled_from(["1", "0", "-1", "x", "1025"]),
}  # fmt: skip


@settings(max_examples=90, **SLOW)
@given(flags=st.dictionaries(st.sampled_from([*FINEWEB]), st.none(), max_size=4), data=st.data(),
       switches=st.lists(st.sampled_from(["--demo", "--verify", "--keep_downloads", "--x"]), max_size=2))  # fmt: skip
def test_fineweb_with_any_flags_ends_well(place, flags, switches, data):
    base = {"out_dir": "new", "dataset": "texts", "shard_tokens": "200", "workers": "1"}
    drawn = {name: data.draw(FINEWEB[name], label=name) for name in flags}
    end_well("fineweb", command(base | drawn, switches), place)


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
                      lambda inner: st.lists(inner, max_size=5) | st.dictionaries(WORDS, inner, max_size=3),
                      max_leaves=6)  # fmt: skip
FIELDS = st.sampled_from(["ctx", "ctx_a", "ctx_b", "activity_label", "label", "endings"])


@settings(max_examples=90, **SLOW)
@given(changes=st.dictionaries(FIELDS, VALUES | WORDS | st.lists(WORDS, min_size=4, max_size=4), max_size=3),
       names=st.sets(st.sampled_from(["style", "limit", "dtype", "model", "per_example"]), max_size=2),
       data=st.data())  # fmt: skip
def test_hellaswag_with_any_rows_and_flags_ends_well(place, changes, names, data):
    kinds = {"style": st.sampled_from(["completion", "harness", "x"]), "limit": numbers(1, 3),
             "dtype": st.sampled_from(["float32", "bfloat16", "x"]),
             "model": st.sampled_from([str(place / "run"), "nowhere", "data", "", "rows.jsonl"]),
             "per_example": st.sampled_from(["scores.jsonl", "data", "no/where", ""])}  # fmt: skip
    base = {"model": str(place / "run"), "device": "cpu", "data": "changed.jsonl"}
    drawn = {name: data.draw(kinds[name], label=name) for name in sorted(names)}
    rows = [ROWS[0], ROWS[1] | changes]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "changed.jsonl"
        path.write_bytes("\n".join(map(json.dumps, rows)).encode(errors="surrogatepass"))
        end_well("hellaswag", command(base | {"data": str(path)} | drawn, []), place)


def test_what_ends_badly_is_noticed(place):
    """The checks above can fail."""
    for stderr, code in (
        ("Traceback (most recent call last):\n  x\n", 1),
        ("a\nb\n", 1),
        ("", 1),
        ("", -9),
        ("x\n", 3),
    ):
        with pytest.raises(AssertionError):
            assert_one_line(type("Result", (), {"args": [], "stderr": stderr, "returncode": code}))
