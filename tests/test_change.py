"""What people change in a training script keeps working: the optimiser, the position encoding, the rates."""

import pytest
import torch
from conftest import (
    CPU,
    TINY,
    assert_resumes_bitwise,
    losses,
    newest,
    run_train,
    sequences,
    stop_after,
    tiny_flags,
)

import hellaswag
import train_gpt2
from hellaswag import Example, HellaSwag
from support import checkpoint
from support.tokens import tokenizer
from train_gpt2 import GPT, TrainConfig, learning_rate, step_batches, train_step


def sgd(model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=config.max_lr, momentum=0.9)


class RotaryAttention(train_gpt2.CausalSelfAttention):
    """Attention that turns queries and keys by their positions, as in RoPE."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:  # (B, H, T, D), by the positions (T,) or (B, T)
        D = x.size(-1)
        angles = self.positions[..., None] / 100 ** (torch.arange(0, D, 2) / D)
        angles = angles if angles.dim() == 2 else angles[:, None]
        real, imaginary = x[..., 0::2], x[..., 1::2]
        turned = (real * angles.cos() - imaginary * angles.sin(), real * angles.sin() + imaginary * angles.cos())
        return torch.stack(turned, dim=-1).flatten(-2)

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in self.c_attn(x).split(C, dim=2))
        q, k = self.rotate(q), self.rotate(k)
        if cache is not None:
            cache[0, :, :, -T:], cache[1, :, :, -T:] = k, v
            k, v = cache
        causal = mask is None and T > 1
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class RotaryGPT(GPT):
    """A GPT without learned positions."""

    def __init__(self, config, seed=0):
        super().__init__(config, seed)
        del self.transformer.wpe

    def hidden(self, tokens, positions=None, mask=None, cache=None):
        T = tokens.size(1)
        S = T if cache is None else cache.size(-2)
        x = self.transformer.wte(tokens)
        for i, block in enumerate(self.transformer.h):
            block.attn.positions = torch.arange(S - T, S) if positions is None else positions
            x = block(x, mask, None if cache is None else cache[i])
        return self.transformer.ln_f(x)


def test_another_optimizer_trains_stops_and_resumes_bitwise(shards, tmp_path, monkeypatch):
    assert run_train(tiny_flags(shards, tmp_path / "adamw")) == 0
    monkeypatch.setattr(train_gpt2, "make_optimizer", sgd)
    assert_resumes_bitwise(tiny_flags, shards, tmp_path)
    assert losses(tmp_path / "unbroken") != losses(tmp_path / "adamw")
    assert newest(tmp_path / "unbroken")["optimizer"]["state"][0].keys() == {"momentum_buffer"}


def test_an_optimizer_whose_state_is_of_another_shape_than_its_weight_resumes_bitwise(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train_gpt2, "make_optimizer", lambda model, config: torch.optim.Adafactor(model.parameters(), lr=config.max_lr)
    )
    assert_resumes_bitwise(tiny_flags, shards, tmp_path)


def test_another_position_encoding_trains_resumes_and_samples(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_gpt2, "CausalSelfAttention", RotaryAttention)
    monkeypatch.setattr(train_gpt2, "GPT", RotaryGPT)
    assert_resumes_bitwise(tiny_flags, shards, tmp_path)
    assert "transformer.wpe.weight" not in newest(tmp_path / "unbroken")["model"]
    capsys.readouterr()
    argv = ["--sample", "--out_dir", tmp_path / "unbroken", "--device", "cpu", "--prompt", "!", "--temperature", 0]
    assert run_train([*argv, "--max_length", 12, "--num_samples", 1]) == 0
    text = capsys.readouterr().out
    model = train_gpt2.load_model(str(tmp_path / "unbroken"))
    expected = [0]  # "!"
    while len(expected) < 12:
        expected.append(model(torch.tensor([expected]))[0, -1].argmax().item())
    assert text == tokenizer().decode(expected) + "\n"


def test_another_position_encoding_is_scored_by_hellaswag_as_its_endings_alone(monkeypatch):
    monkeypatch.setattr(train_gpt2, "CausalSelfAttention", RotaryAttention)
    model, context, endings = RotaryGPT(TINY), [5, 6, 7], [[8, 9, 1], [10, 2], [11, 12, 3], [13]]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)  # so that attention matters
        expected = []
        for ending in endings:
            log_probabilities = model(torch.tensor([context + ending]))[0].log_softmax(-1)
            places = range(len(context) - 1, len(context + ending) - 1)
            expected.append(sum(log_probabilities[i, token].item() for i, token in zip(places, ending, strict=True)))
    data = HellaSwag([Example(0, context, endings, [1] * 4, 0)], "completion", TINY)
    assert hellaswag.evaluate(model, data, CPU)[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_parameters_that_are_grouped_in_another_way_are_refused(shards, tmp_path, monkeypatch):
    def grouped(model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
        first, *rest = model.parameters()
        return torch.optim.SGD([{"params": rest}, {"params": [first]}], lr=config.max_lr, momentum=0.9)

    monkeypatch.setattr(train_gpt2, "make_optimizer", grouped)
    stop_after(3, flags := tiny_flags(shards, tmp_path / "log", save_every=1))
    monkeypatch.setattr(train_gpt2, "make_optimizer", sgd)
    with pytest.raises(ValueError, match="parameter group"):
        run_train(flags)


def test_an_error_in_the_models_code_on_resume_is_a_traceback_and_no_checkpoint_is_passed_over(
    shards, tmp_path, monkeypatch, capsys
):
    class Typo(GPT):
        def __init__(self, config, seed=0):
            super().__init__(config, seed)
            self.transformer.wte.wieght  # noqa: B018

    flags = tiny_flags(shards, tmp_path / "log")
    assert run_train(flags) == 0
    before = {path: path.read_bytes() for path in checkpoint.find(tmp_path / "log")}
    capsys.readouterr()
    monkeypatch.setattr(train_gpt2, "GPT", Typo)
    for argv in (flags, ["--sample", "--out_dir", tmp_path / "log"]):
        with pytest.raises(AttributeError, match="wieght"):
            run_train(argv)
    monkeypatch.setattr(train_gpt2, "GPT", RotaryGPT)  # nor are weights that another model had
    with pytest.raises(RuntimeError, match="wpe"):
        run_train(flags)
    assert capsys.readouterr().err == ""
    assert {path: path.read_bytes() for path in checkpoint.find(tmp_path / "log")} == before


def test_two_groups_with_rates_of_their_own_keep_their_ratio_through_the_schedule(shards, tmp_path, monkeypatch):
    def two_rates(model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
        head, *rest = model.parameters()
        return torch.optim.SGD([{"params": [head], "lr": 4 * config.max_lr}, {"params": rest}], lr=config.max_lr)

    model, config = GPT(TINY), TrainConfig(batch_tokens=128, micro_batch=8, max_steps=6, warmup_steps=2)
    optimizer, data = two_rates(model, config), sequences(shards, "train")
    for step in range(1, 7):
        train_step(model, optimizer, step_batches(step, data, config, 0, 1), step, config, CPU)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([4 * learning_rate(step, config), learning_rate(step, config)], rel=1e-12)
    monkeypatch.setattr(train_gpt2, "make_optimizer", two_rates)
    assert_resumes_bitwise(tiny_flags, shards, tmp_path)
    saved = newest(tmp_path / "stopped")["optimizer"]["param_groups"]
    assert saved[0]["lr"] == pytest.approx(4 * saved[1]["lr"])
