"""Weights out to `transformers` and in again: the same numbers, text and tokens, whole folders only."""

import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    TINY,
    environment,
    run_forked,
    run_script,
    run_train,
    sequences,
    small_files,
    start_forked,
    start_script,
    tiny_flags,
    wait_for,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import fineweb
from support import checkpoint, huggingface
from support.files import whole_folder
from support.log import read_log
from support.tokens import END_OF_TEXT, tokenizer
from support.world import World
from train_gpt2 import GPT, SampleConfig, generate, load_model

PROMPT = "A man is sitting on a roof."
STEPS = {"warmup_steps": 0, "batch_tokens": 256}  # which is four sequences of the pretrained model


@pytest.fixture(scope="session")
def exported(tmp_path_factory, pretrained):
    """The folder of a short run from random weights far from uniform, with the whole vocabulary, and its export."""
    folder = tmp_path_factory.mktemp("exported")
    tokens = np.array(tokenizer().encode(f"{PROMPT} It's late, 世界. " * 40), dtype=np.uint16)
    (folder / "data").mkdir()
    for name in ("val_000000", "train_000001"):
        np.save(folder / "data" / f"text_{name}.npy", tokens)
    flags = tiny_flags(folder / "data", folder / "log", init_from=pretrained[1], max_steps=2, **STEPS)
    assert run_train(flags) == 0
    assert run_train(["--export", folder / "out", "--out_dir", folder / "log"]) == 0
    return folder


def theirs_of(folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


# ---------------------------------------------------------------- weights


def test_exported_logits_are_ours_to_1e_4(exported):
    ours, theirs = load_model(str(exported / "log")), theirs_of(exported / "out")
    x = torch.randint(50257, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, ours(x)[..., :50257], rtol=1e-4, atol=1e-4)
    assert theirs.config.n_positions == 64
    assert theirs.lm_head.weight is theirs.transformer.wte.weight


def test_exported_weights_are_cropped_tied_float32_and_bear_the_usual_names(exported):
    weights = load_file(exported / "out" / "model.safetensors")
    reference = {name for name, _ in theirs_of(exported / "out").named_parameters()}
    assert weights.keys() == reference
    assert weights["transformer.wte.weight"].shape == (50257, 48)
    assert weights["transformer.h.0.mlp.c_fc.weight"].shape == (48, 192)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    config = json.loads((exported / "out" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert config["vocab_size"] == 50257
    assert config["resid_pdrop"] == config["embd_pdrop"] == config["attn_pdrop"] == 0  # as it was trained
    generation = json.loads((exported / "out" / "generation_config.json").read_text())
    for ends in (config, generation):
        assert ends["bos_token_id"] == ends["eos_token_id"] == END_OF_TEXT
    assert generation["pad_token_id"] == END_OF_TEXT
    assert config["n_ctx"] == 64  # llama.cpp's converter asks for it
    assert json.loads((exported / "out" / "tokenizer_config.json").read_text())["model_max_length"] == 64
    assert not [path for path in exported.iterdir() if path.name not in ("data", "log", "out")]


def test_exported_loaded_and_exported_again_the_tensors_are_the_same_to_the_bit(exported, tmp_path):
    assert run_train(["--export", tmp_path / "again", "--init_from", exported / "out"]) == 0
    first, again = (load_file(folder / "model.safetensors") for folder in (exported / "out", tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(w, again[name]) for name, w in first.items())
    files = "config.json generation_config.json tokenizer.json tokenizer_config.json vocab.json merges.txt"
    for name in files.split():
        assert (tmp_path / "again" / name).read_bytes() == (exported / "out" / name).read_bytes()


def test_transformers_4_finds_vocabulary_and_merges_in_the_files_it_reads(exported):
    vocabulary = json.loads((exported / "out" / "vocab.json").read_text())
    assert (len(vocabulary), vocabulary["<|endoftext|>"]) == (50257, END_OF_TEXT)
    version, *merges = (exported / "out" / "merges.txt").read_text().splitlines()
    assert version.startswith("#version")
    assert (len(merges), merges[0]) == (50_000, "\u0120 t")


def test_prompts_of_several_lengths_go_through_generate_as_one_batch(exported):
    theirs, encoding = theirs_of(exported / "out"), AutoTokenizer.from_pretrained(exported / "out")
    prompts = ["The sea", "It was the best of times, it was the worst of", "a"]
    batch = encoding(prompts, return_tensors="pt", padding=True)
    found = theirs.generate(**batch, max_new_tokens=8, do_sample=False)[:, -8:]
    for prompt, row in zip(prompts, found, strict=True):
        one = theirs.generate(**encoding(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert row.tolist() == one[0, -8:].tolist()


# ---------------------------------------------------------------- text


def test_greedy_text_is_the_same_through_generate_and_pipeline(exported):
    model = load_model(str(exported / "log"))
    prompt = tokenizer().encode(PROMPT)
    config = SampleConfig(num_samples=1, max_length=40, temperature=0)
    expected = generate(model, prompt, config, 0, CPU)[0]
    out, ids = exported / "out", torch.tensor([prompt])
    theirs = theirs_of(out)
    found = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_length=40, do_sample=False)
    assert found[0].tolist()[: len(expected)] == expected
    assert len(expected) > len(prompt)
    text = pipeline("text-generation", model=str(out))(PROMPT, do_sample=False)[0]["generated_text"]
    assert text.startswith(tokenizer().decode(expected))
    assert len(tokenizer().encode(text)) <= 64  # by itself it doesn't pass the window


def test_the_tokenizer_gives_our_ids_on_strings_of_every_plane(exported):
    theirs, rng = AutoTokenizer.from_pretrained(exported / "out", local_files_only=True), random.Random(0)
    words = ["the", " and", "'s", "'ll", " don't", "  ", "\n", "\r\n", "\t ", " 1,024", "...", "\u3000", "é", "e\u0301"]
    planes = [(plane << 16, (plane << 16) + 0xFFFF) for plane in range(17)]
    texts = []
    for i in range(17 * 700):
        first, last = planes[i % 17]
        pieces = [rng.choice(words) if rng.random() < 0.4 else chr(rng.randint(first, last)) for _ in range(12)]
        texts.append("".join(piece for piece in pieces if not "\ud800" <= piece <= "\udfff"))
    assert theirs(texts)["input_ids"] == [tokenizer().encode_ordinary(text) for text in texts]
    for text in texts[::10]:
        assert theirs.decode(tokenizer().encode_ordinary(text)) == text
    assert theirs("a<|endoftext|>b")["input_ids"] == [64, END_OF_TEXT, 65]
    assert len(json.loads((exported / "out" / "tokenizer.json").read_text())["model"]["merges"]) == 50_000


@pytest.mark.slow
def test_the_tokenizer_knows_every_code_point_as_ours_does():
    theirs = huggingface.fast_tokenizer().backend_tokenizer
    texts = [f"a{c} {c}1" for c in map(chr, range(0, 0x110000, 41)) if not "\ud800" <= c <= "\udfff"]
    expected = tokenizer().encode_ordinary_batch(texts)
    assert [found.ids for found in theirs.encode_batch(texts)] == expected


# ---------------------------------------------------------------- whole folders only


@pytest.mark.parametrize("what", ["folder", "empty folder", "file", "dangling link"])
def test_nothing_that_exists_is_overwritten_by_an_export(exported, tmp_path, capsys, what):
    out = tmp_path / "out"
    if what.endswith("folder"):
        out.mkdir()
    if what == "folder":
        (out / "mine").write_text("x")
    elif what == "file":
        out.write_text("x")
    elif what == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    assert run_train(["--export", out, "--out_dir", exported / "log"]) == 2
    error = capsys.readouterr().err
    assert error == f"train_gpt2.py: --export {out}: that is there already, name a folder that isn't\n"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_an_export_to_a_full_disk_leaves_nothing_and_one_line(exported, tmp_path):
    argv = ["train_gpt2.py", "--export", tmp_path / "out", "--out_dir", exported / "log"]
    result = run_script(argv, preexec_fn=small_files(300_000))
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("train_gpt2.py: cannot write the export: ")
    assert "File too large" in last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_export_says_nothing_but_whose_weights_they_are(exported, tmp_path):
    result = run_script(["train_gpt2.py", "--export", tmp_path / "out", "--out_dir", exported / "log"])
    assert result.stdout == ""
    assert [line[:11] for line in result.stderr.splitlines()] == ["weights of "]


def test_a_failed_export_leaves_nothing(exported, tmp_path, monkeypatch, capsys):
    def fail(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "fast_tokenizer", fail)
    assert run_train(["--export", tmp_path / "out", "--out_dir", exported / "log"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_export_leaves_no_half_folder_and_the_next_one_is_whole(exported, tmp_path):
    argv = ["train_gpt2", "--export", tmp_path / "out", "--out_dir", exported / "log"]
    process = start_forked(argv, tmp_path / "stdout", tmp_path / "stderr")
    wait_for(lambda: any(tmp_path.glob(".out.*/out/*")), process)
    process.kill()
    process.join()
    assert not (tmp_path / "out").exists()
    assert run_train(argv[1:]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(exported / "out"))


@pytest.mark.slow
def test_of_two_that_make_the_same_folder_one_wins(tmp_path):
    def make(name: str) -> None:
        with whole_folder(tmp_path / "out") as folder:
            (folder / name).write_text("x")
            time.sleep(0.2)

    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(make, name) for name in "ab")
    failed = [future.exception() for future in (first, second)]
    assert sorted(type(error).__name__ for error in failed) == ["FileExistsError", "NoneType"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b" if failed[0] else "a"]
    processes = [start_script(["fineweb.py", "--demo", "--out_dir", tmp_path / "demo"]) for _ in range(3)]
    for process in processes:
        assert process.communicate()[1].startswith(f"{tmp_path / 'demo'}: 10 shards")
    fineweb.Manifest.load(tmp_path / "demo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "out"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error), whole_folder(tmp_path / "a" / "b") as folder:
            (folder / "half").write_text("x")
            assert not (tmp_path / "a" / "b").exists()
            raise error
    with whole_folder(tmp_path / "a" / "b") as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "a" / "b"):
        pass
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["whole"]


def test_an_export_without_a_checkpoint_or_with_another_vocabulary_ends_in_one_line(shards, tmp_path, capsys):
    assert run_train(["--export", tmp_path / "out", "--out_dir", tmp_path / "log"]) == 1
    assert f"no checkpoint in {tmp_path / 'log'}" in capsys.readouterr().err
    assert run_train(tiny_flags(shards, tmp_path / "log", max_steps=3, eval_every=0)) == 0
    capsys.readouterr()
    assert run_train(["--export", tmp_path / "out", "--out_dir", tmp_path / "log"]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("train_gpt2.py: cannot export, as this is no GPT-2 of `transformers`")
    assert "transformer.wte.weight" in error
    assert not (tmp_path / "out").exists()
    assert run_train(["--export", tmp_path / "out", "--sample"]) == 2


@pytest.mark.slow
def test_two_ranks_export_once(exported, tmp_path):
    argv = ["train_gpt2", "--export", tmp_path / "out", "--out_dir", exported / "log"]
    result = run_forked(argv, tmp_path, ranks=2)
    assert result.returncode == 0, result.stderr
    first, again = (load_file(folder / "model.safetensors") for folder in (exported / "out", tmp_path / "out"))
    assert all(torch.equal(w, again[name]) for name, w in first.items())


# ---------------------------------------------------------------- weights in


def evaluation(exported, out, *flags) -> dict:
    """The log of a run of no steps."""
    argv = tiny_flags(exported / "data", out, init_from=exported / "out", max_steps=0, **STEPS)
    assert run_train([*argv, *flags]) == 0
    return read_log(out / "log.jsonl")


def test_max_steps_0_only_evaluates_in_the_usual_log(exported, tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"ctx": PROMPT, "endings": ["It's late.", "世界.", "No.", "A man."], "label": "0"}
    rows.write_text(json.dumps(row) + "\n")
    more = ["--hellaswag_every", 1, "--hellaswag_data", rows, "--batch_tokens", 7]  # a batch is never made
    events = evaluation(exported, tmp_path / "log", *more)
    assert events.keys() == {"start", "val", "hellaswag"}
    assert events["val"].keys() == events["hellaswag"].keys() == {0}
    assert events["hellaswag"][0]["examples"] == 1
    trained = read_log(exported / "log" / "log.jsonl")["val"][2]
    assert events["val"][0]["loss"] == pytest.approx(trained["loss"], abs=1e-5)
    assert events["val"][0]["tokens"] == trained["tokens"]
    assert not checkpoint.find(tmp_path / "log")


def test_a_smaller_block_size_drops_positions_and_a_larger_one_is_refused(exported, tmp_path, capsys):
    events = evaluation(exported, tmp_path / "log", "--block_size", 16)
    assert events["start"][0]["block_size"] == 16
    theirs = theirs_of(exported / "out")
    tokens = torch.from_numpy(np.load(exported / "data" / "text_val_000000.npy").astype(np.int64))
    x, y = (tokens[at : at + 160].view(10, 16) for at in (0, 1))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).item()
    assert events["val"][0]["loss"] == pytest.approx(expected, abs=1e-4)
    capsys.readouterr()
    for argv in (["--sample"], ["--export", tmp_path / "out"], tiny_flags("data", tmp_path / "log2")[:4]):
        assert run_train([*argv, "--init_from", exported / "out", "--block_size", 65]) == 2
        error = capsys.readouterr().err
        assert error.endswith(f"--block_size 65: {exported / 'out'} has 64 positions\n")


def test_a_run_from_cropped_weights_trains_resumes_and_keeps_its_block_size(exported, tmp_path, capsys):
    def run(max_steps, block_size):
        flags = tiny_flags(exported / "data", tmp_path / "log", init_from=exported / "out", max_steps=max_steps)
        return run_train([*flags, "--block_size", block_size, "--extend"])

    assert run(3, 16) == 0
    assert run(5, 16) == 0
    assert load_model(str(tmp_path / "log")).transformer.wpe.weight.shape == (16, 48)
    assert list(read_log(tmp_path / "log" / "log.jsonl")["train"]) == [1, 2, 3, 4, 5]
    capsys.readouterr()
    assert run(6, 8) == 2
    assert "--block_size is 8, but 16 in the run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("size", ["gpt2", "gpt2-xl", "distilgpt2", "openai-community/gpt2", "SOME-one/their_gpt2"])
def test_the_weights_of_a_name_come_from_the_hub(exported, tmp_path, hub, size):
    hub.datasets[size] = {path.name: path.read_bytes() for path in (exported / "out").iterdir()}
    argv = tiny_flags(exported / "data", tmp_path / "log", init_from=size, max_steps=0, **STEPS)
    result = run_script(["train_gpt2.py", *argv], env=environment(hub, tmp_path))
    assert result.returncode == 0, result.stderr
    assert any(path.endswith("/model.safetensors") for method, path in hub.asked if method == "GET")
    found, trained = (read_log(folder / "log" / "log.jsonl")["val"] for folder in (tmp_path, exported))
    assert found[0]["loss"] == pytest.approx(trained[2]["loss"], abs=1e-5)


def test_validation_in_bfloat16_does_not_round_logits_that_lie_at_minus_100(tmp_path, shards):
    # As OpenAI's do: there bfloat16 has steps of 0.5.
    from train_gpt2 import TrainConfig, evaluate

    model, data = GPT(TINY), sequences(shards, "val")
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = 0
        model.transformer.ln_f.bias[0] = 1
        model.transformer.wte.weight[:, 1:] *= 20
        model.transformer.wte.weight[:, 0] = -100
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        losses.append(evaluate(model, data, TrainConfig(micro_batch=64), World(0, 1, CPU.device, dtype))[0])
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
