"""Sampling: what is drawn, where it ends, and where it is printed."""

import dataclasses

import pytest
import torch
from conftest import CPU, TINY, run_script, run_train, tiny_flags

import train_gpt2
from support.tokens import END_OF_TEXT, tokenizer
from train_gpt2 import GPT, SampleConfig, generate

FULL = dataclasses.replace(TINY, vocab_size=50304)


def spread(config=FULL) -> GPT:
    """A model with random weights whose logits are far from uniform."""
    model = GPT(config)
    with torch.no_grad():
        model.transformer.wte.weight[: config.n_vocab] *= 20
    return model


def test_padded_ids_are_never_sampled():
    model = GPT(FULL)
    with torch.no_grad():  # all logits equal, but for those of the padded rows, which would win
        model.transformer.wte.weight[:] = 0
        model.transformer.wte.weight[50257:] = 100
        model.transformer.ln_f.bias[:] = 1
    config = SampleConfig(num_samples=40, max_length=6, top_k=50257, temperature=1.0)
    for temperature in (0.0, 1.0, 1e6):
        samples = generate(model, [1], dataclasses.replace(config, temperature=temperature), 0, CPU)
        assert max(max(s) for s in samples) < 50257
    assert len({token for s in samples for token in s}) > 50


def test_a_sample_is_drawn_token_by_token_from_the_k_likeliest():
    model = spread()
    for k in (1, 3):
        for s in generate(model, [5, 6], SampleConfig(num_samples=8, max_length=14, top_k=k), 0, CPU):
            for t in range(2, len(s)):
                likeliest = model(torch.tensor([s[:t]]))[0, -1].topk(k).indices
                assert s[t] in likeliest


def test_frequencies_follow_the_softmax_of_the_k_likeliest():
    model = spread()
    config = SampleConfig(num_samples=4000, max_length=2, top_k=5, temperature=2.0)
    drawn = torch.tensor([s[1] for s in generate(model, [7], config, 0, CPU)])
    values, ids = model(torch.tensor([[7]]))[0, -1].topk(5)
    for probability, token in zip((values / 2.0).softmax(0), ids, strict=True):
        assert (drawn == token).float().mean().item() == pytest.approx(probability.item(), abs=0.04)


def test_temperature_0_is_greedy_and_so_is_the_smallest_one():
    model = spread()
    expected = [3, 4]
    while len(expected) < 14:
        expected.append(model(torch.tensor([expected]))[0, -1].argmax().item())
    for temperature in (0.0, 1e-300):
        samples = generate(model, [3, 4], SampleConfig(num_samples=2, max_length=14, temperature=temperature), 0, CPU)
        assert samples == [expected, expected]


@pytest.mark.parametrize("n", [1, 15, 16, 17, 30])
def test_the_window_slides_past_the_block_size(n):
    model = spread()
    with torch.no_grad():  # so that the likeliest token hangs on every token of the window and on its place
        model.transformer.wpe.weight *= 20
        for block in model.transformer.h:
            block.attn.c_attn.weight *= 10
            block.attn.c_proj.weight *= 100
    config = SampleConfig(num_samples=1, max_length=40, temperature=0)
    sample = generate(model, list(range(3, 3 + n)), config, 0, CPU)[0]
    assert len(sample) == 40
    for t in range(n, 40):
        assert sample[t] == model(torch.tensor([sample[max(0, t - 16) : t]]))[0, -1].argmax()


def test_a_sample_stops_at_end_of_text_and_the_others_go_on():
    model = GPT(FULL)
    with torch.no_grad():  # <|endoftext|> has one chance in three at each step
        model.transformer.wte.weight[:] = 0
        model.transformer.ln_f.bias[:] = 1
        model.transformer.wte.weight[[10, 11, END_OF_TEXT]] = 10.0
    samples = generate(model, [10], SampleConfig(num_samples=50, max_length=12, top_k=3), 0, CPU)
    assert all(END_OF_TEXT not in s for s in samples)
    lengths = {len(s) for s in samples}
    assert 1 in lengths
    assert len(lengths) > 4
    assert all(set(s) <= {10, 11} for s in samples)


def test_an_empty_prompt_starts_from_end_of_text():
    model = spread()
    config = SampleConfig(prompt="", num_samples=9, max_length=9, temperature=30.0)
    samples = generate(model, [END_OF_TEXT], config, 0, CPU)
    assert max(map(len, samples)) > 1
    assert train_gpt2.sample_texts(model, config, 0, CPU) == [tokenizer().decode(ids[1:]) for ids in samples]


@pytest.fixture
def trained(tmp_path, shards):
    """The folder of a short run with the full vocabulary."""
    flags = tiny_flags(shards, tmp_path / "log", vocab_size=50304, max_steps=3, eval_every=0)
    assert run_train(flags) == 0
    return tmp_path / "log"


def test_samples_go_to_stdout_and_everything_else_to_stderr(trained, capsys):
    capsys.readouterr()
    argv = [
        "--sample",
        "--out_dir",
        trained,
        "--device",
        "cpu",
        "--prompt",
        "A man",
        "--num_samples",
        2,
        "--max_length",
        8,
    ]
    assert run_train(argv) == 0
    out, err = capsys.readouterr()
    assert out.count("A man") == 2
    assert "sample 1 of 2" not in out
    assert str(trained) in err
    assert run_train(argv) == 0
    assert capsys.readouterr().out == out
    assert run_train([*argv, "--seed", 5]) == 0
    assert capsys.readouterr().out != out


def test_samples_come_from_weights_of_transformers_too(tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    argv = ["--sample", "--init_from", tmp_path / "hf", "--device", "cpu", "--prompt", "A man", "--temperature", 0,
            "--num_samples", 1, "--max_length", 12]  # fmt: skip
    assert run_train(argv) == 0
    ids = torch.tensor([tokenizer().encode("A man")])
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_length=12, do_sample=False, pad_token_id=END_OF_TEXT
    )
    assert capsys.readouterr().out == tokenizer().decode(expected[0].tolist()).split("<|endoftext|>")[0] + "\n"


@pytest.mark.slow
def test_a_terminal_that_knows_ascii_only_is_no_reason_to_stop(trained):
    argv = [
        "train_gpt2.py",
        "--sample",
        "--out_dir",
        trained,
        "--prompt",
        "héé 世界",
        "--num_samples",
        "1",
        "--max_length",
        "12",
    ]
    result = run_script(argv, env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert result.returncode == 0, result.stderr
    assert "h??" in result.stdout
