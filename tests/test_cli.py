"""The command line: what the flags are, and what a user is told when something is wrong."""

import dataclasses
import os
import subprocess
import sys
import zipfile
from functools import cache, partial

import numpy as np
import pytest
import torch
from conftest import ROOT, newest, run_forked, run_script, run_train, tiny_flags, write_shards

import fineweb
import hellaswag
import train_gpt2
from support import checkpoint
from support.cli import exit_status, parse_configs
from support.log import read_log


def the_line(capsys) -> str:
    """The one line on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("train_gpt2.py: ")
    assert error.count("\n") == 1
    return error


def test_importing_a_module_does_nothing(tmp_path):
    program = (
        "import os, sys, torch\n"
        "before = torch.random.get_rng_state(), set(os.environ.items()), torch.get_float32_matmul_precision()\n"
        "import fineweb, hellaswag, train_gpt2\n"
        "after = torch.random.get_rng_state(), set(os.environ.items()), torch.get_float32_matmul_precision()\n"
        "assert torch.equal(before[0], after[0]) and before[1:] == after[1:]\n"
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n"
        "print(sorted({'transformers', 'matplotlib', 'huggingface_hub'} & set(sys.modules)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"
    assert list(tmp_path.iterdir()) == []


def test_the_defaults_are_the_gpt2_124m_reproduction():
    config, shape = train_gpt2.TrainConfig(), train_gpt2.GPTConfig()
    assert dataclasses.astuple(shape) == (1024, 50304, 12, 12, 768)
    assert (config.data_dir, config.out_dir, config.compile) == ("edu_fineweb10B", "log", True)
    assert (config.batch_tokens, config.max_steps, config.warmup_steps) == (524288, 19073, 715)
    assert (config.max_lr, config.min_lr, config.weight_decay, config.grad_clip) == (6e-4, 6e-5, 0.1, 1.0)
    assert config.val_tokens == 10485760


@cache
def help_of(script: str) -> subprocess.CompletedProcess:
    """--help on a terminal of 80 columns, and what was imported for it on stderr."""
    environment = os.environ | {"COLUMNS": "80"}
    argv = [sys.executable, "-X", "importtime", ROOT / script, "--help"]
    return subprocess.run(argv, env=environment, capture_output=True, text=True)


def test_help_names_every_flag_and_says_what_a_resumed_run_may_change():
    result = help_of("train_gpt2.py")
    assert result.returncode == 0
    flags = """--data_dir --out_dir --seed --device --dtype --compile --no-compile --block_size --vocab_size
        --n_layer --n_head --n_embd --optimizer --max_steps --warmup_steps --max_lr --min_lr --embedding_lr --decay
        --weight_decay --init_std --grad_clip --batch_tokens --micro_batch --val_tokens --eval_every
        --hellaswag_every --sample_every --save_every --init_from --resume --no-resume --demo --sample
        --prompt --num_samples --max_length --top_k --temperature"""
    for name in flags.split():
        assert name in result.stdout
    assert "--extend" in result.stdout[result.stdout.index("A run resumes") :]
    assert "--seed N " in result.stdout
    assert "--max_lr FLOAT " in result.stdout
    assert "--out_dir DIR " in result.stdout


@pytest.mark.parametrize("script", ["train_gpt2.py", "fineweb.py", "hellaswag.py"])
def test_help_fits_80_columns_and_begins_with_what_people_reach_for(script):
    result = help_of(script)
    assert [line for line in result.stdout.splitlines() if len(line) > 80] == []
    if script == "train_gpt2.py":
        first = [result.stdout.index(f"  --{name}") for name in ("demo", "init_from", "out_dir", "micro_batch", "seed")]
        assert first == sorted(first)


@pytest.mark.parametrize("script", ["train_gpt2.py", "fineweb.py"])
def test_help_does_not_wait_for_torch(script):
    imported = {line.split("|")[-1].strip() for line in help_of(script).stderr.splitlines()}
    assert "support.cli" in imported
    assert "torch" not in imported


def test_a_bad_flag_beside_help_is_one_line():
    result = run_script(["train_gpt2.py", "--max_steps", "three", "--help"])
    assert result.returncode == 2
    assert result.stderr == "train_gpt2.py: argument --max_steps: invalid integer value: 'three' (see --help)\n"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--sample", "train"])
def test_nothing_is_imported_that_the_mode_does_not_need(mode, shards, tmp_path):
    flags = tiny_flags(shards, tmp_path / "log", compile=False, max_steps=1, warmup_steps=0, eval_every=0)
    if mode == "--sample":
        run_train(flags)
    argv = [*flags, "--sample"] if mode == "--sample" else flags
    unwanted = {"transformers", "matplotlib", "huggingface_hub", "safetensors"}
    if mode != "train":  # torch's own optimisers import it
        unwanted.add("torch._inductor")
    program = (
        "import atexit, sys, train_gpt2\n"
        f"unwanted = {unwanted!r}\n"
        "atexit.register(lambda: print('loaded:', sorted(unwanted & {*sys.modules}), file=sys.stderr))\n"
        f"train_gpt2.main({argv!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == "loaded: []"


def test_without_shards_the_default_command_says_what_to_run(tmp_path):
    (tmp_path / "empty").mkdir()
    result = run_forked(["train_gpt2.py"], tmp_path, cwd=tmp_path / "empty")
    assert result.returncode == 1
    assert result.stderr == (
        "train_gpt2.py: no train shards in edu_fineweb10B: "
        "run `python fineweb.py` first, or try --demo; shards of your own are called NAME_train_000001.npy or .bin\n"
    )
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--frobnicate 3", "--frobnicate"),
        ("--max_step 3", "--max_step 3"),
        ("--max_steps", "--max_steps"),
        ("--max_steps three", "three"),
        ("--max_steps -1", "--max_steps -1"),
        ("--batch_tokens 0", "--batch_tokens 0"),
        ("--batch_tokens -524288", "--batch_tokens -524288"),
        ("--micro_batch 0", "--micro_batch 0"),
        ("--micro_batch some", "invalid integer or auto value: 'some'"),
        ("--block_size 0", "--block_size 0"),
        ("--vocab_size 0", "--vocab_size 0"),
        ("--n_layer 0", "--n_layer 0"),
        ("--n_layer -2", "--n_layer -2"),
        ("--n_head 0", "--n_head 0"),
        ("--n_embd 0", "--n_embd 0"),
        ("--n_embd 15 --n_head 4", "--n_embd 15 is not divisible by --n_head 4"),
        ("--val_tokens 0", "--val_tokens 0"),
        ("--eval_every -1", "--eval_every -1"),
        ("--save_every -1", "--save_every -1"),
        ("--warmup_steps 6", "--warmup_steps 6"),
        ("--max_lr nan", "--max_lr nan"),
        ("--max_lr -1", "--max_lr -1"),
        ("--min_lr 1", "--min_lr 1"),
        ("--grad_clip inf", "--grad_clip inf"),
        ("--seed -1", "--seed -1"),
        ("--seed 4294967296", "--seed 4294967296"),
        ("--dtype half", "half"),
        ("--device tpu", "tpu"),
        ("--top_k 0", "--top_k 0"),
        ("--num_samples 0", "--num_samples 0"),
        ("--max_length 0", "--max_length 0"),
        ("--temperature -0.1", "--temperature -0.1"),
        (f"--max_steps {10**23}", "--max_steps"),
        ("extra", "extra"),
    ],
)
def test_a_bad_flag_is_one_line_and_status_2(shards, tmp_path, capsys, argv, named):
    assert run_train([*tiny_flags(shards, tmp_path / "log"), *argv.split()]) == 2
    assert named in the_line(capsys)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        ("--lr 3e-4", "it is --max_lr"),
        ("--learning_rate 3e-4", "it is --max_lr"),
        ("--batch_size 8", "--micro_batch for a pass"),
        ("--grad_accum 8", "--batch_tokens for a step"),
        ("--epochs 3", "give --max_steps"),
        ("--model gpt2", "give --init_from"),
        ("--compile False", "--compile, or --no-compile"),
        ("--resume log/ckpt_000100.pt", "--init_from FILE"),
        ("--sample The sea", "--prompt"),
        ("--mask_unsen", "see --help"),
        ("--learning-rate 1", "it is --max_lr"),
        ("--batch-size 8", "--micro_batch for a pass"),
        ("--gradient_accumulation_steps 8", "--batch_tokens for a step"),
    ],
)
def test_the_names_of_other_scripts_get_a_hint(capsys, argv, hint):
    assert run_train(argv.split()) == 2
    assert hint in the_line(capsys)


@pytest.mark.parametrize("script", [fineweb, hellaswag])
def test_hints_are_the_training_scripts_alone(script, capsys):
    name = f"{script.__name__}.py"
    assert exit_status(partial(script.main, ["my_texts"]), name) == 2
    assert capsys.readouterr().err == f"{name}: unrecognized arguments: my_texts (see --help)\n"


def test_whole_numbers_may_be_written_with_an_exponent(capsys):
    argv = ["--batch_tokens", "1e6", "--max_steps", "2e3"]
    _, (config,) = parse_configs(argv, "", {}, {"training": train_gpt2.TrainConfig})
    assert (config.batch_tokens, config.max_steps) == (1_000_000, 2000)
    assert type(config.batch_tokens) is int
    for text in ("1.5", "1e-3", "nan", "inf"):
        assert run_train(["--max_steps", text]) == 2
        assert text in the_line(capsys)


@pytest.mark.parametrize("n_embd", [2**24, 2**31])
def test_a_model_too_large_for_the_memory_is_one_line(shards, tmp_path, capsys, n_embd):
    assert run_train(tiny_flags(shards, tmp_path / "log", n_embd=n_embd)) == 1
    assert "out of memory: take smaller batches (--micro_batch;" in the_line(capsys)


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_shorter_than_a_sequence_are_named(tmp_path, capsys, split):
    folder = write_shards(tmp_path / "data", [100], split="val" if split == "train" else "train")
    write_shards(folder, [16, 9], split=split)
    assert run_train(tiny_flags(folder, tmp_path / "log")) == 1
    line = the_line(capsys)
    assert "--block_size 16" in line
    assert "at most 15" in line


def test_an_empty_folder_and_a_missing_validation_shard_are_named(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    assert run_train(tiny_flags(tmp_path / "data", tmp_path / "log")) == 1
    assert f"no train shards in {tmp_path / 'data'}" in the_line(capsys)
    write_shards(tmp_path / "data", [100])
    assert run_train(tiny_flags(tmp_path / "data", tmp_path / "log")) == 1
    assert f"no val shards in {tmp_path / 'data'}" in the_line(capsys)
    assert run_train(tiny_flags(tmp_path / "data", tmp_path / "log", eval_every=0)) == 0


@pytest.mark.parametrize("tokens", [np.zeros(99, np.int32), np.zeros((9, 99), np.uint16), np.full(99, 96, np.uint16)])
def test_a_bad_shard_ends_the_run_in_one_line(shards, tmp_path, capsys, tokens):
    path = shards / "tiny_train_000002.npy"
    np.save(path, tokens)
    assert run_train(tiny_flags(shards, tmp_path / "log")) == 1
    assert str(path) in the_line(capsys)


def test_an_out_dir_that_cannot_be_written_is_named(shards, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_train(tiny_flags(shards, tmp_path / "file" / "log")) == 1
    assert str(tmp_path / "file" / "log") in the_line(capsys)
    assert run_train(tiny_flags(shards, tmp_path / "file")) == 1
    assert str(tmp_path / "file") in the_line(capsys)


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.isdir("/proc/1"), reason="needs a folder that refuses files")
def test_an_out_dir_that_takes_no_files_is_named(shards, capsys):
    assert run_train(tiny_flags(shards, "/proc/1")) == 1
    assert "/proc/1" in the_line(capsys)


@pytest.mark.parametrize(
    "argv",
    [
        ["--prompt", "one two three", "--max_length", "3"],
        ["--prompt", "one two three four", "--max_length", "3"],
        ["--prompt", "language"],
        ["--prompt", ""],
    ],
)
def test_sampling_flags_that_do_not_fit_are_refused(shards, tmp_path, capsys, argv):
    assert run_train(tiny_flags(shards, tmp_path / "log")) == 0
    capsys.readouterr()
    assert run_train(["--sample", "--out_dir", tmp_path / "log", "--device", "cpu", *argv]) == 2
    assert argv[0] in capsys.readouterr().err.splitlines()[-1]


def test_sampling_without_a_checkpoint_says_what_to_do(tmp_path, capsys):
    assert run_train(["--sample", "--out_dir", tmp_path / "log"]) == 1
    assert f"no checkpoint in {tmp_path / 'log'}" in the_line(capsys)
    assert run_train(["--sample", "--init_from", "gpt3"]) == 1
    assert "no checkpoint in gpt3, nor what `transformers` saves" in the_line(capsys)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "bit rot", "pickle"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(shards, tmp_path, capsys, damage):
    flags = tiny_flags(shards, tmp_path / "log")
    assert run_train(flags) == 0
    path = checkpoint.find(tmp_path / "log")[-1]
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:2000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("hello\nworld\n")
    elif damage == "bit rot":
        weight = newest(tmp_path / "log")["model"]["transformer.wte.weight"].numpy().tobytes()
        content[content.index(weight) + 100] ^= 1
        path.write_bytes(content)
    elif damage == "pickle":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("log/data.pkl", b"\x80\x02}q\x00(X\x05")
    before = path.read_bytes()
    capsys.readouterr()
    sampling = ["--sample", "--out_dir", tmp_path / "log", "--device", "cpu", "--prompt", "!", "--max_length", "4"]
    for argv in (sampling, flags):
        assert run_train(argv) == 0  # from the checkpoint before it
        assert f"warning: cannot read checkpoint {path} (" in capsys.readouterr().err.splitlines()[0]
        assert (path.read_bytes() == before) == (argv is sampling)
    assert newest(tmp_path / "log")["step"] == 6

    path.write_bytes(before)
    for other in checkpoint.find(tmp_path / "log")[:-1]:
        other.unlink()
    for argv in (flags, sampling):
        assert run_train(argv) == 1
        assert str(path) in the_line(capsys)
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "why"),
    [([1, 2, 3], "train_gpt2.py didn't write it"), ({"model": {}, "model_args": {}}, "this has vocab_size 0")],
)
def test_a_checkpoint_of_another_script_is_one_line(shards, tmp_path, capsys, content, why):
    torch.save(content, tmp_path / "theirs.pt")
    assert run_train(tiny_flags(shards, tmp_path / "log", init_from=tmp_path / "theirs.pt")) == 1
    line = the_line(capsys)
    assert str(tmp_path / "theirs.pt") in line
    assert why in line


def test_a_checkpoint_that_holds_code_is_not_run(shards, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    (tmp_path / "log").mkdir()
    torch.save({"model": Evil()}, tmp_path / "log" / "ckpt_000001.pt")
    assert run_train(["--sample", "--out_dir", tmp_path / "log"]) == 1
    assert not (tmp_path / "evil").exists()


def test_demo_changes_defaults_only(tmp_path, shards, capsys):
    flags = tiny_flags(shards, tmp_path / "log")
    assert run_train(["--demo", *flags]) == 0
    start = read_log(tmp_path / "log" / "log.jsonl")["start"][0]
    assert start["demo"] is True
    assert (start["n_embd"], start["max_steps"], start["data_dir"]) == (16, 6, str(shards))


def test_several_ranks_without_torchrun_are_one_line(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_train(tiny_flags(shards, tmp_path / "log")) == 1
    assert the_line(capsys).startswith("train_gpt2.py: cannot join the other ranks (")
