"""--mask_unseen: tokens that are in no shard get no probability, anywhere, and it stays so."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    TINY,
    assert_same,
    losses,
    newest,
    run_forked,
    run_train,
    sequences,
    stop_after,
    tiny_flags,
    write_shards,
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import fineweb
import hellaswag
from fineweb import find_token_ids
from support.cli import UserError, exit_status
from support.log import read_log
from support.tokens import find_shards, tokenizer
from train_gpt2 import GPT, SampleConfig, TrainConfig, evaluate, generate, load_model

SEEN = [*range(0, 96, 3)]


def masked(seed: int = 0, config=TINY) -> GPT:
    model = GPT(config, seed)
    model.allow(SEEN)
    return model


def seen_tokens(*shape: int) -> torch.Tensor:
    return 3 * torch.randint(32, shape, generator=torch.Generator().manual_seed(1))


def occurring(folder) -> list[int]:
    """The ids in the shards of a folder, found in another way."""
    return np.unique(np.concatenate([np.load(path) for path in folder.glob("*.npy")])).tolist()


# ---------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize("path", ["cpu", "accelerator"])
def test_loss_and_gradients_are_those_of_logits_at_minus_infinity(path, monkeypatch):
    model, x, y = masked(), seen_tokens(4, 16), seen_tokens(4, 16).roll(1)
    if path == "accelerator":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    plain = GPT(TINY)
    full = F.linear(plain.hidden(x), plain.lm_head.weight)
    unseen = [i for i in range(96) if i not in SEEN]
    full[..., unseen] = -torch.inf
    expected = F.cross_entropy(full.flatten(0, 1), y.flatten())
    loss = model(x, y)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)
    assert model.lm_head.weight.grad[unseen].abs().max() == 0
    torch.testing.assert_close(model(x), full)
    assert model(x)[..., unseen].max() == -torch.inf
    # Impossible, not merely unlikely.
    for unseen_target in (1, 95):
        y[2, 3] = unseen_target
        assert model(x, y).item() == torch.inf


def test_unseen_tokens_are_never_sampled():
    model = masked()
    with torch.no_grad():
        model.transformer.wte.weight[1::3] *= 100  # what would win
    for temperature in (0.0, 1.0, 1e9):
        config = SampleConfig(num_samples=50, max_length=12, top_k=96, temperature=temperature)
        samples = generate(model, [1], config, 0, CPU)  # the prompt may have one
        assert {token for s in samples for token in s[1:]} <= set(SEEN)
    assert len({token for s in samples for token in s[1:]}) == len(SEEN)


def test_validation_masks_too(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    np.save(folder / "a_val_000000.npy", seen_tokens(200).numpy().astype(np.uint16))
    data = sequences(folder, "val", SEEN)
    model, config = masked(), TrainConfig(micro_batch=4)
    x, y = data.read(range(12))
    expected = F.cross_entropy(GPT(TINY)(x)[..., SEEN].flatten(0, 1), y.flatten() // 3).item()
    for dtype in (torch.float32, torch.bfloat16):
        found, _ = evaluate(model, data, config, dataclasses.replace(CPU, dtype=dtype))
        assert found == pytest.approx(expected, abs=1e-5 if dtype == torch.float32 else 1e-2)


# ---------------------------------------------------------------- which tokens


def test_unseen_tokens_are_counted_over_all_shards(shards):
    assert find_token_ids(str(shards), 96) == occurring(shards)
    write_shards(shards, [50])
    assert find_token_ids(str(shards), 96) == occurring(shards)


def test_the_demo_masks_what_does_not_occur(tmp_path):
    fineweb.write_demo(tmp_path / "data")
    flags = ["--demo", "--data_dir", tmp_path / "data", "--out_dir", tmp_path / "log", "--max_steps", 1,
             "--warmup_steps", 0, "--eval_every", 0, "--sample_every", 0, "--device", "cpu"]  # fmt: skip
    assert run_train(flags) == 0
    expected = occurring(tmp_path / "data")
    assert newest(tmp_path / "log")["token_ids"] == expected
    assert read_log(tmp_path / "log" / "log.jsonl")["start"][0]["tokens_allowed"] == len(expected)


# ---------------------------------------------------------------- a run


@pytest.fixture
def sparse(tmp_path):
    """Shards as in `shards`, but of the tokens SEEN only."""
    folder = write_shards(write_shards(tmp_path / "sparse", [200], split="val"), [130, 97, 111])
    for path in folder.iterdir():
        np.save(path, np.load(path) // 3 * 3)
    return folder


def test_a_masked_run_learns_and_its_resume_is_bitwise(sparse, tmp_path, capsys):
    flags = tiny_flags(sparse, tmp_path / "log", mask_unseen=True, save_every=1)
    assert run_train(flags) == 0
    assert f"{len(occurring(sparse))} of 96 tokens occur" in capsys.readouterr().out
    assert newest(tmp_path / "log")["token_ids"] == occurring(sparse)
    assert run_train(tiny_flags(sparse, tmp_path / "plain")) == 0
    assert newest(tmp_path / "plain").keys() == newest(tmp_path / "log").keys() - {"token_ids"}
    on, off = losses(tmp_path / "log"), losses(tmp_path / "plain")
    assert on[1] < np.log(32) + 0.1
    assert off[1] > np.log(96) - 0.1
    stopped = tiny_flags(sparse, tmp_path / "stopped", mask_unseen=True, save_every=1)
    stop_after(3, stopped)
    assert run_train(stopped) == 0
    assert losses(tmp_path / "stopped") == on
    for key in ("model", "optimizer", "token_ids"):
        assert_same(newest(tmp_path / "stopped")[key], newest(tmp_path / "log")[key])
    capsys.readouterr()
    assert run_train(tiny_flags(sparse, tmp_path / "log")) == 2
    assert "--mask_unseen is False, but True" in (error := capsys.readouterr().err)
    assert "give --mask_unseen to resume it" in error
    assert run_train(tiny_flags(sparse, tmp_path / "plain", mask_unseen=True)) == 2
    assert "give --no-mask_unseen to resume it" in capsys.readouterr().err


def test_a_mask_that_leaves_nothing_out_changes_nothing_to_the_bit(tmp_path):
    folder = write_shards(write_shards(tmp_path / "data", [200], split="val"), [130, 97, 111])
    path = folder / "tiny_train_000001.npy"
    np.save(path, np.concatenate([np.arange(96), np.load(path)]).astype(np.uint16))
    for name, mask in (("on", True), ("off", False)):
        assert run_train(tiny_flags(folder, tmp_path / name, mask_unseen=mask)) == 0
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    assert_same(newest(tmp_path / "on")["model"], newest(tmp_path / "off")["model"])


@pytest.mark.parametrize(
    ("ranks", "compile"),
    [pytest.param(1, True, marks=pytest.mark.slow), (2, False), pytest.param(2, True, marks=pytest.mark.slow)],
)
def test_a_masked_run_is_the_same_compiled_and_on_two_ranks(sparse, tmp_path, ranks, compile):
    assert run_train(tiny_flags(sparse, tmp_path / "one", mask_unseen=True)) == 0
    flags = tiny_flags(sparse, tmp_path / "other", mask_unseen=True, compile=compile)
    result = run_forked(["train_gpt2", *flags], tmp_path, ranks=ranks)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr
    one, other = losses(tmp_path / "one"), losses(tmp_path / "other")
    assert list(other.values()) == pytest.approx(list(one.values()), abs=1e-4)
    assert newest(tmp_path / "other")["token_ids"] == occurring(sparse)


def rewrite(path, tokens) -> None:
    """Replace a shard, and not what is in it: threads of a run that was stopped may still read that."""
    np.save(path.with_suffix(".new.npy"), tokens)
    path.with_suffix(".new.npy").replace(path)


def test_a_shard_with_a_token_that_the_mask_leaves_out_is_named(sparse, tmp_path, capsys):
    flags = tiny_flags(sparse, tmp_path / "log", mask_unseen=True)
    stop_after(2, flags)
    path = sparse / "tiny_train_000002.npy"
    rewrite(path, np.full_like(np.load(path), 1))
    capsys.readouterr()
    assert run_train(flags) == 1
    assert f"{path} holds token 1, which is none of the model's" in capsys.readouterr().err
    rewrite(path, np.zeros(100, dtype=np.uint16))
    path = sparse / "tiny_val_000000.npy"
    rewrite(path, np.full_like(np.load(path), 1))
    assert run_train(tiny_flags(sparse, tmp_path / "new", init_from=tmp_path / "log", max_steps=0, warmup_steps=0)) == 1
    assert f"{path} holds token 1, which is none of the model's" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_of_a_masked_run_serve_another_without_its_mask(sparse, shards, tmp_path):
    assert run_train(tiny_flags(sparse, tmp_path / "masked", mask_unseen=True, max_steps=3)) == 0
    assert len(load_model(str(tmp_path / "masked")).token_ids) == len(occurring(sparse))
    flags = tiny_flags(shards, tmp_path / "new", init_from=tmp_path / "masked")
    assert run_train(flags) == 0
    assert len(load_model(str(tmp_path / "new")).token_ids) == 96
    assert all(np.isfinite(loss) for loss in losses(tmp_path / "new").values())
    # But it is evaluated as it was.
    flags = tiny_flags(sparse, tmp_path / "evaluated", init_from=tmp_path / "masked", max_steps=0, warmup_steps=0)
    assert run_train(flags) == 0
    found, trained = (read_log(tmp_path / name / "log.jsonl")["val"] for name in ("evaluated", "masked"))
    assert found[0]["loss"] == pytest.approx(trained[3]["loss"], abs=1e-5)


# ---------------------------------------------------------------- the whole vocabulary


@pytest.fixture
def prose(tmp_path, capsys):
    """The folder of a run over a few words with the whole vocabulary; and the ids that occur."""
    text = tokenizer().encode("A man is sitting on a roof. " * 60)
    (tmp_path / "data").mkdir()
    for name in ("val_000000", "train_000001"):
        np.save(tmp_path / "data" / f"text_{name}.npy", np.array(text, dtype=np.uint16))
    flags = tiny_flags(tmp_path / "data", tmp_path / "log", mask_unseen=True, vocab_size=50304)
    assert run_train(flags) == 0
    capsys.readouterr()
    return tmp_path / "log", set(text)


def test_samples_of_a_masked_checkpoint_hold_seen_tokens_only(prose, capsys):
    out, seen = prose
    argv = ["--sample", "--out_dir", out, "--device", "cpu", "--prompt", "A man", "--top_k", 50257, "--temperature", 9]
    assert run_train(argv) == 0
    words = set(capsys.readouterr().out.replace(".", " ").replace("A", " ").split())
    assert len(words) > 4
    assert words <= {tokenizer().decode([token]).strip() for token in seen}


def test_hellaswag_calls_an_ending_with_an_unseen_token_impossible(prose, tmp_path, capsys):
    out, _ = prose
    row = {"ctx": "A man is sitting on a", "label": 2}
    rows = [row | {"endings": ["zebra.", "roof zebra.", "roof.", "of"]}, row | {"endings": ["x", "y", "z", "q"]},
            row | {"endings": ["x", "y", "z", "q"], "label": 0}]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = ["--model", str(out), "--data", str(tmp_path / "rows.jsonl"), "--device", "cpu", "--per_example",
            str(tmp_path / "each.jsonl")]  # fmt: skip
    assert exit_status(lambda: hellaswag.main(argv), "hellaswag.py") == 0
    assert json.loads(capsys.readouterr().out)["acc"] == pytest.approx(1 / 3)
    each = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "each.jsonl").read_text().splitlines()]
    assert [score is None for score in each[0]["scores"]] == [True, True, False, True]
    assert each[0]["prediction"] == each[0]["prediction_norm"] == 2
    assert each[1]["scores"] == each[1]["scores_norm"] == [None] * 4


def test_a_masked_model_is_exported_with_its_mask_for_generate(prose, tmp_path):
    out, seen = prose
    assert run_train(["--export", tmp_path / "hf", "--out_dir", out]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert set(range(50257)) - set(theirs.generation_config.suppress_tokens) == seen
    model, prompt = load_model(str(out)), tokenizer().encode("A man")
    with torch.no_grad():
        for m in (model.transformer.wte, theirs.transformer.wte):
            m.weight[5000] = 100 * model.transformer.ln_f.bias.sign()  # unseen, and it would win
            m.weight[5001] = -m.weight[5000]
    ids = torch.tensor([prompt])
    found = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_length=14, do_sample=False)[0].tolist()
    expected = generate(model, prompt, SampleConfig(num_samples=1, max_length=14, temperature=0), 0, CPU)[0]
    assert found == expected
    assert set(found) <= seen
    # And in again.
    assert set(load_model(str(tmp_path / "hf")).token_ids.tolist()) == seen
    assert run_train(["--export", tmp_path / "again", "--init_from", tmp_path / "hf"]) == 0
    name = "generation_config.json"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()


def test_every_token_of_a_mask_must_be_known_to_the_model(tmp_path, capsys):
    folder = write_shards(write_shards(tmp_path / "data", [200], split="val"), [130])
    path = folder / "tiny_train_000001.npy"
    np.save(path, np.append(np.load(path), np.uint16(96)))
    assert run_train(tiny_flags(folder, tmp_path / "log", mask_unseen=True)) == 1
    assert "holds token 96, the model knows 96" in capsys.readouterr().err
    with pytest.raises(UserError, match="no train or val shards"):
        find_shards(str(tmp_path / "nowhere"), "train|val")
