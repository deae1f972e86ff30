"""The model is GPT-2: its shape, its arithmetic, its initial weights."""

import dataclasses
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from support import cpu
from support.cli import UserError
from train_gpt2 import GPT, GPTConfig, load_model

PADDED = dataclasses.replace(TINY, vocab_size=50304)


def tokens(*shape: int, vocab_size: int = 96) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def test_a_logit_depends_on_no_later_token():
    model, x = GPT(TINY), tokens(1, 16)
    before = model(x)
    for t in range(1, 16):
        changed = x.clone()
        changed[0, t:] = (changed[0, t:] + 1) % 96
        after = model(changed)
        assert torch.equal(after[0, :t], before[0, :t])
        assert not torch.allclose(after[0, t], before[0, t])


def test_gpt2_124m_has_124439808_parameters():
    with torch.device("meta"):
        unpadded = GPT2LMHeadModel(GPT2Config())
    model = GPT(GPTConfig(vocab_size=50257))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808 == unpadded.num_parameters()
    assert GPT(GPTConfig(), seed=None).n_params == model.n_params == 124_439_808


def test_head_and_embedding_are_one_tensor_after_loading_too():
    model = GPT(TINY)
    model.load_state_dict(GPT(TINY, seed=2).state_dict())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_vocabulary_smaller_than_the_other_tensors_loads_too(tmp_path):
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=48, n_layer=1, n_head=2, vocab_size=90)).eval()
    theirs.save_pretrained(tmp_path)
    x = tokens(1, 16, vocab_size=90)
    torch.testing.assert_close(GPT.from_pretrained(str(tmp_path))(x), theirs(x).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunked", [True, False])
def test_logits_loss_and_gradients_agree_with_transformers(pretrained, chunked, monkeypatch):
    theirs, folder = pretrained
    theirs.zero_grad()
    ours = GPT.from_pretrained(str(folder))
    if not chunked:  # the loss that accelerators take
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x, y = tokens(3, 64, vocab_size=50257), tokens(3, 64, vocab_size=50257).roll(1)
    logits = theirs(x).logits
    torch.testing.assert_close(ours(x)[..., :50257], logits, rtol=1e-4, atol=1e-4)
    assert ours(x).shape == (3, 64, 50304)

    their_loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    our_loss = ours(x, y)
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-4, atol=1e-4)
    their_loss.backward()
    our_loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, p in theirs.named_parameters():
        theirs_grad = p.grad.T if p.dim() == 2 and "c_" in name else p.grad
        torch.testing.assert_close(gradients[name][: len(theirs_grad)], theirs_grad, rtol=1e-4, atol=1e-4)


def test_padded_rows_get_no_probability_and_no_gradient():
    model, x = GPT(PADDED), tokens(2, 16)
    with torch.no_grad():
        model.transformer.wte.weight[50257:] = 5.0
    probabilities = model(x).softmax(-1)
    assert probabilities[..., 50257:].max() == 0
    torch.testing.assert_close(model(x, x), F.cross_entropy(model(x)[..., :50257].flatten(0, 1), x.flatten()))
    model(x, x).backward()
    assert model.lm_head.weight.grad[50257:].abs().max() == 0
    assert model.lm_head.weight.grad.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_chunked_loss_is_cross_entropy(scale):
    generator = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(2 * cpu.HeadLoss.ROWS + 3, 8, generator=generator)).requires_grad_()
    weight = torch.randn(300, 8, generator=generator, requires_grad=True)
    targets = torch.randint(300, (len(x),), generator=generator)
    expected = F.cross_entropy(F.linear(x, weight), targets)
    expected_grads = torch.autograd.grad(3 * expected, (x, weight))
    found = cpu.HeadLoss.apply(x, weight, len(weight), targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(3 * found, (x, weight)), expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_a_loss_without_a_gradient_makes_none_and_the_next_one_is_right(first, monkeypatch):
    model, x = GPT(TINY), tokens(2, 16)
    expected = F.cross_entropy(model(x).flatten(0, 1), x.flatten())
    cpu.scratch.cache_clear()
    with first(), monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "addmm_", None)  # with which the head's gradient is made
        torch.testing.assert_close(model(x, x), expected)
    model(x, x).backward()
    found = model.lm_head.weight.grad.clone()
    model.zero_grad()
    expected.backward()
    torch.testing.assert_close(found, model.lm_head.weight.grad)


def test_losses_in_several_threads_do_not_meet():
    model, batches = GPT(PADDED), [tokens(20, 16), tokens(20, 16).flip(0)]
    with torch.no_grad():
        expected = [model(x, x.roll(1)).item() for x in batches]
    assert expected[0] != expected[1]

    def losses(x):
        with torch.no_grad():
            return [model(x, x.roll(1)).item() for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        for found, wanted in zip(pool.map(losses, batches), expected, strict=True):
            assert found == [wanted] * 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_than_float32_have_a_loss_too(dtype):
    model, x = GPT(TINY), tokens(2, 16)
    expected = model(x, x).item()
    assert model.to(dtype)(x, x).item() == pytest.approx(expected, rel=1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_few_rows_are_multiplied_as_many_are(rows, autocast):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((rows, 1, 48), (80, 48), (80,)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found, expected = cpu.linear(x, weight, bias), F.linear(x, weight, bias)
    assert found.is_contiguous()  # what comes next would be slow
    torch.testing.assert_close(found, expected)  # the type too


def test_initial_weights_are_gpt2s_and_come_from_the_seed_alone():
    config = GPTConfig(n_layer=4, n_embd=192, n_head=4, vocab_size=50304)
    torch.manual_seed(1)
    model = GPT(config, seed=7)
    torch.manual_seed(2)
    again, other = GPT(config, seed=7), GPT(config, seed=8)
    for (name, p), q, r in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        if name.endswith("bias"):
            assert p.abs().max() == 0
        elif ".ln_" in name:
            assert torch.equal(p, torch.ones_like(p))
        else:
            assert not torch.equal(p, r)
            expected = 0.02 / math.sqrt(8) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.02)
    assert model(tokens(2, 64), tokens(2, 64) + 96).item() == pytest.approx(math.log(50257), abs=0.1)


def test_one_batch_can_be_learned_by_heart():
    model, x = GPT(TINY), tokens(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        loss = model(x[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"activation_function": "relu"}, "activation_function"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn"),
        ({"n_inner": 32}, "n_inner"),
    ],
)
def test_weights_of_another_architecture_are_refused(tmp_path, change, named):
    GPT2LMHeadModel(
        GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2, vocab_size=90, **change)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=named):
        GPT.from_pretrained(str(tmp_path))


def test_weights_that_are_not_complete_are_refused(tmp_path):
    config = GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2, vocab_size=90)
    theirs = GPT2LMHeadModel(config)
    weights = {name: w for name, w in theirs.state_dict().items() if "c_attn.weight" not in name}
    theirs.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(UserError, match=r"lacks transformer\.h\.0\.attn\.c_attn\.weight"):
        GPT.from_pretrained(str(tmp_path))


def test_more_tokens_than_gpt2_has_are_refused(tmp_path):
    config = GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2, vocab_size=50258)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="50258 tokens"):
        GPT.from_pretrained(str(tmp_path))


def saved_gpt2(folder, **changes) -> GPT2LMHeadModel:
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2, **changes)).eval()
    theirs.save_pretrained(folder)
    return theirs


def assert_same_logits(ours: GPT, theirs: GPT2LMHeadModel) -> None:
    x = tokens(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[..., :50257], theirs(x).logits[..., :50257], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"vocab_size": 50304}, {"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 64}]
)
def test_a_padded_vocabulary_and_gelu_by_another_name_are_taken(tmp_path, changes):
    theirs = saved_gpt2(tmp_path, **changes)
    ours = GPT.from_pretrained(str(tmp_path))
    assert_same_logits(ours, theirs)
    assert ours.token_ids.tolist() == list(range(50257))


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_not_the_embedding_is_refused_and_a_copy_is_taken(tmp_path, equal):
    theirs = saved_gpt2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights["transformer.wte.weight"].clone()
    save_file(weights | {"lm_head.weight": head if equal else head + 0.1}, tmp_path / "model.safetensors")
    if equal:
        assert_same_logits(GPT.from_pretrained(str(tmp_path)), theirs)
    else:
        with pytest.raises(UserError, match=r"its lm_head\.weight is not its wte\.weight"):
            GPT.from_pretrained(str(tmp_path))


def nanogpts(model: GPT, kind: str, folder, **changes):
    """A file as nanoGPT or build-nanogpt saves it, of a model."""
    weights = {name: w for name, w in model.state_dict().items()}
    weights["transformer.h.0.attn.bias"] = torch.ones(16, 16).tril().view(1, 1, 16, 16)
    fields = vars(model.config) | changes
    if kind == "nanoGPT":
        compiled = {f"_orig_mod.{name}": w for name, w in weights.items()}
        arguments = fields | {"bias": True, "dropout": 0.0} | changes
        state = {"model": compiled, "iter_num": 5, "model_args": arguments, "config": {"dataset": "x"}}
    else:
        main = sys.modules["__main__"]
        main.GPTConfig = type("GPTConfig", (), {"__module__": "__main__"})
        config = main.GPTConfig()
        vars(config).update(fields)
        state = {"model": weights, "config": config, "step": 5, "val_loss": 3.0}
    torch.save(state, folder / "model.pt")
    if kind != "nanoGPT":
        del main.GPTConfig
    return folder / "model.pt"


@pytest.mark.parametrize("kind", ["nanoGPT", "build-nanogpt"])
def test_checkpoints_of_nanogpt_and_build_nanogpt_are_taken(tmp_path, capsys, kind):
    model = GPT(dataclasses.replace(TINY, vocab_size=50304, n_layer=1))
    found = load_model(str(nanogpts(model, kind, tmp_path)))
    assert found.config == model.config
    assert torch.equal(found(tokens(2, 16)), model(tokens(2, 16)))
    assert ("computes GELU by erf" in capsys.readouterr().err) == (kind == "nanoGPT")


@pytest.mark.parametrize("change", ["no head", "another head", "of DDP"])
def test_checkpoints_of_nanogpt_have_a_head_that_is_the_embedding(tmp_path, change):
    model = GPT(dataclasses.replace(TINY, vocab_size=50304, n_layer=1))
    path = nanogpts(model, "nanoGPT", tmp_path)
    state = torch.load(path)
    head = state["model"].pop("_orig_mod.lm_head.weight")
    if change == "another head":
        state["model"]["_orig_mod.lm_head.weight"] = head + 1
    if change == "of DDP":
        state["model"] = {f"module.{name}": w for name, w in state["model"].items()}
    torch.save(state, path)
    if change == "another head":
        with pytest.raises(UserError, match=r"its lm_head\.weight is not its wte\.weight"):
            load_model(str(path))
    else:
        assert torch.equal(load_model(str(path))(tokens(2, 16)), model(tokens(2, 16)))


@pytest.mark.parametrize(
    "state", [{"model": {}, "config": {"a": 1}}, {"model": {}, "model_args": {"vocab_size": None}}]
)
def test_a_checkpoint_of_another_fork_is_refused_in_a_line(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match="didn't write it|this has vocab_size 0"):
        load_model(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("changes", [{"bias": False}, {"vocab_size": 65}])
def test_a_checkpoint_of_nanogpt_that_is_no_gpt2_is_refused_by_name(tmp_path, changes):
    path = nanogpts(GPT(dataclasses.replace(TINY, n_layer=1)), "nanoGPT", tmp_path, **{"vocab_size": 50304} | changes)
    with pytest.raises(UserError, match=rf"{path}: .*{'=False' if 'bias' in changes else 'vocab_size 65'}"):
        load_model(str(path))


def test_a_folder_without_weights_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        GPT.from_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)
