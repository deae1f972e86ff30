"""--optimizer muon: what it does to which weights, on how many ranks, and what comes with it."""

import math
from functools import partial

import pytest
import torch
from conftest import (
    CPU,
    TINY,
    assert_resumes_bitwise,
    assert_same,
    losses,
    newest,
    run_forked,
    run_train,
    sequences,
    stop_after,
    tiny_flags,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train_gpt2
from support.log import read_log
from support.muon import Muon
from train_gpt2 import DEMO, GPT, MUON, TrainConfig, learning_rate, load_model, make_optimizer, step_batches, train_step

muon_flags = partial(tiny_flags, optimizer="muon", decay="linear", min_lr=0.0, embedding_lr=2.0)
CONFIG = TrainConfig(optimizer="muon", batch_tokens=128, micro_batch=8, max_steps=6, warmup_steps=2, max_lr=1e-2,
                     min_lr=0.0, embedding_lr=2.0, decay="linear")  # fmt: skip
DEMO_RECIPE = {name: DEMO[name] for name in ("optimizer", "max_lr", "weight_decay", "init_std", "warmup_steps")}
SHAPES = [(24, 8), (8, 24), (8, 8), (24, 8), (8, 32), (32, 8)]  # of six matrices, three shapes but for transposing


def random_matrices() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def trained(optimizer, parameters, steps: int = 5) -> None:
    """Make steps with the same gradients, whatever the optimiser; the last parameter has none in the first."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for p in parameters:
            gradient = torch.randn(p.shape, generator=generator)
            p.grad = None if p is parameters[-1] and step == 0 else gradient
        optimizer.step()


def test_stacked_updates_are_those_of_torchs_own_muon():
    ours, theirs = random_matrices(), random_matrices()
    table = torch.nn.Parameter(torch.zeros(3, 3))
    trained(Muon(ours, torch.optim.AdamW([table]), lr=0.02, weight_decay=0.1, dtype=torch.bfloat16), ours)
    trained(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs)
    for p, expected, before in zip(ours, theirs, random_matrices(), strict=True):
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-5)
        assert (p - before).abs().max() > 0.02


def test_an_update_of_a_matrix_has_the_root_mean_square_of_adamws():
    matrices, table = random_matrices(), torch.nn.Parameter(torch.zeros(3, 3))
    before = [p.detach().clone() for p in matrices]
    for p in matrices:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) * 1e-3  # whatever its size
    Muon(matrices, torch.optim.AdamW([table]), lr=0.01, weight_decay=0.0).step()
    for p, was in zip(matrices, before, strict=True):
        update = (p.detach() - was) / 0.01
        assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)
        # Every direction counts alike, as singular values lie between 0.7 and 1.2.
        values = torch.linalg.svdvals(update) / (0.2 * math.sqrt(max(p.shape)))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_embeddings_biases_and_gains_get_adamws_update(shards):
    model = GPT(TINY)
    optimizer = make_optimizer(model, CONFIG)
    matrices = {p for p in model.transformer.h.parameters() if p.dim() == 2}
    assert len(matrices) == 4 * TINY.n_layer
    assert [group["weight_decay"] for group in optimizer.param_groups] == [CONFIG.weight_decay, 0.0, 0.0]
    others = [(name, p) for name, p in model.named_parameters() if p not in matrices]
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in others}
    tables = {"params": [p for p in copies.values() if p.dim() == 2], "lr": 2e-2}
    vectors = {"params": [p for p in copies.values() if p.dim() == 1]}
    assert len(tables["params"]) == 2
    adamw = torch.optim.AdamW([tables, vectors], lr=1e-2, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
    data = sequences(shards, "train")
    for step in range(1, 4):
        train_step(model, optimizer, step_batches(step, data, CONFIG, 0, 1), step, CONFIG, CPU)
        for group, ratio in zip(adamw.param_groups, (2, 1), strict=True):
            group["lr"] = ratio * learning_rate(step, CONFIG)
        for name, p in others:
            copies[name].grad = p.grad
        adamw.step()
        for name, p in others:
            assert torch.equal(p, copies[name]), name
    assert {p for p in optimizer.state if "momentum_buffer" in optimizer.state[p]} == matrices


def test_adamws_embeddings_may_have_a_rate_of_their_own_too():
    model = GPT(TINY)
    optimizer = make_optimizer(model, TrainConfig(embedding_lr=4.0, max_lr=1e-3))
    rate = {p: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(rate) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        expected = 4e-3 if name in ("transformer.wte.weight", "transformer.wpe.weight") else 1e-3
        assert rate[p] == (pytest.approx(expected), 0.1 if p.dim() == 2 else 0.0)


def test_each_groups_rate_follows_the_schedule_after_a_resume_too(shards, tmp_path, monkeypatch):
    rates, real = [], train_gpt2.train_step

    def train_step(model, optimizer, batches, step, config, *rest):
        result = real(model, optimizer, batches, step, config, *rest)
        parts = [*optimizer.param_groups, *optimizer.others.param_groups]
        rates.append([group["lr"] / learning_rate(step, config) for group in parts])
        return result

    flags = muon_flags(shards, tmp_path / "log", save_every=1)
    stop_after(3, flags)
    monkeypatch.setattr(train_gpt2, "train_step", train_step)
    assert run_train(flags) == 0
    assert len(rates) == 3
    for ratios in rates:
        assert ratios == pytest.approx([1, 2, 1, 2, 1])


def test_muon_resumes_bitwise_and_nothing_of_it_is_lost(shards, tmp_path):
    assert_resumes_bitwise(muon_flags, shards, tmp_path)
    state = newest(tmp_path / "stopped")["optimizer"]["state"]
    kinds = [set(entry) for entry in state.values()]
    assert kinds.count({"momentum_buffer"}) == 4 * TINY.n_layer
    assert kinds.count({"step", "exp_avg", "exp_avg_sq"}) == len(kinds) - 4 * TINY.n_layer


# With three ranks a stack of two matrices leaves one idle, a stack of four is cut unevenly.
@pytest.mark.parametrize("ranks", [2, 3])
def test_muon_on_several_ranks_is_muon_on_one(shards, tmp_path, ranks):
    batch = {"batch_tokens": 192, "micro_batch": 2}
    assert run_train(muon_flags(shards, tmp_path / "one", **batch)) == 0
    result = run_forked(["train_gpt2", *muon_flags(shards, tmp_path / "many", **batch)], tmp_path, ranks=ranks)
    assert (result.returncode, result.stderr) == (0, "")
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert list(many.values()) == pytest.approx(list(one.values()), abs=1e-5)
    weights = newest(tmp_path / "many")["model"]
    for name, expected in newest(tmp_path / "one")["model"].items():
        if expected.dim() == 2:
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-4)


def test_muon_with_accumulated_gradients_is_muon_with_one_batch(shards):
    models = []
    for micro_batch in (2, 8):
        config = TrainConfig(**vars(CONFIG) | {"micro_batch": micro_batch})
        model = GPT(TINY)
        optimizer, data = make_optimizer(model, config), sequences(shards, "train")
        for step in range(1, 4):
            train_step(model, optimizer, step_batches(step, data, config, 0, 1), step, config, CPU)
        models.append(model.state_dict())
    for name, ours in models[0].items():
        torch.testing.assert_close(ours, models[1][name], rtol=0, atol=1e-5)


def test_what_muon_has_trained_is_a_gpt2_of_transformers(shards, tmp_path, pretrained):
    flags = muon_flags(shards, tmp_path / "log", init_from=pretrained[1], max_steps=2, warmup_steps=0, batch_tokens=128,
                       micro_batch=1, block_size=64)  # fmt: skip
    assert run_train(flags) == 0
    assert run_train(["--export", tmp_path / "out", "--out_dir", tmp_path / "log"]) == 0
    ours = load_model(str(tmp_path / "log"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    x = torch.randint(50257, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, ours(x)[..., :50257], rtol=1e-4, atol=1e-4)
    trained, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(pretrained[1] / "model.safetensors")
    for name in ("c_attn", "c_proj"):  # changed, but not begun anew
        change = (trained[f"transformer.h.0.attn.{name}.weight"] - before[f"transformer.h.0.attn.{name}.weight"]).abs()
        assert 1e-3 < change.max() < 0.1
        assert change.mean() < 0.02


# ---------------------------------------------------------------- the recipe


def test_muon_brings_its_defaults_and_flags_go_before_them(shards, tmp_path, capsys):
    shape = {"block_size": 16, "vocab_size": 96, "n_layer": 1, "n_head": 1, "n_embd": 16, "max_steps": 0}
    few = [f"--{name}={value}" for name, value in shape.items()]
    few += ["--eval_every=0", "--hellaswag_every=0", "--sample_every=0", "--device=cpu", f"--data_dir={shards}"]
    for name, flags, expected in (
        ("muon", ["--optimizer", "muon"], MUON | {"max_steps": 0}),
        ("mine", ["--optimizer", "muon", "--max_lr", "0.004"], MUON | {"max_steps": 0, "max_lr": 0.004}),
        ("demo", ["--demo", "--optimizer", "muon"], DEMO_RECIPE),
        ("classic", [], {"optimizer": "adamw", "max_lr": 6e-4, "min_lr": 6e-5, "decay": "cosine", "init_std": 0.02}),
    ):
        assert run_train([*few, *flags, "--out_dir", tmp_path / name]) == 0
        start = read_log(tmp_path / name / "log.jsonl")["start"][0]
        assert {key: start[key] for key in expected} == expected
    assert run_train(["--optimizer", "sgd"]) == 2
    assert "invalid choice: 'sgd' (choose from 'adamw', 'muon')" in capsys.readouterr().err


def test_the_linear_decay_ends_at_min_lr_one_step_after_the_last():
    config = TrainConfig(**MUON)
    assert learning_rate(125, config) == pytest.approx(0.9e-3)
    assert learning_rate(251, config) == pytest.approx(1.8e-3)
    assert learning_rate(251 + 6750 // 2, config) == pytest.approx(0.9e-3)
    assert learning_rate(7000, config) == pytest.approx(1.8e-3 / 6750)
    config = TrainConfig(decay="linear")
    assert learning_rate(19073, config) == pytest.approx(6e-5 + (6e-4 - 6e-5) / (19073 - 715))


def test_initial_weights_are_as_wide_as_asked_and_residual_projections_zero_under_muon(shards, tmp_path):
    for name, flags in (("muon", muon_flags), ("adamw", tiny_flags)):
        still = {"max_steps": 1, "warmup_steps": 0, "max_lr": 1e-12, "min_lr": 0.0}
        assert run_train(flags(shards, tmp_path / name, init_std=0.08, **still)) == 0
        weights = newest(tmp_path / name)["model"]
        assert weights["transformer.h.0.mlp.c_fc.weight"].std() == pytest.approx(0.08, rel=0.1)
        assert weights["transformer.wte.weight"].std() == pytest.approx(0.08, rel=0.1)
        for projection in ("transformer.h.1.attn.c_proj.weight", "transformer.h.1.mlp.c_proj.weight"):
            expected = 0.0 if name == "muon" else 0.08 / math.sqrt(2 * TINY.n_layer)
            assert weights[projection].std() == pytest.approx(expected, rel=0.15, abs=1e-9)


@pytest.mark.parametrize(("change", "said"), [
    ({"optimizer": "adamw"}, "--optimizer is adamw, but muon in the run"),
    ({"embedding_lr": 1.0}, "--embedding_lr is 1.0, but 2.0 in the run"),
    ({"decay": "cosine"}, "--decay is cosine, but linear in the run"),
    ({"init_std": 0.03}, "--init_std is 0.03, but 0.02 in the run"),
    ({"max_lr": 0.5, "decay": "cosine"}, "0.01; --decay is cosine, but linear in the run in {}: give {} to resume it"),
])  # fmt: skip
def test_the_recipe_cannot_change_on_resume(shards, tmp_path, capsys, change, said):
    stop_after(3, muon_flags(shards, tmp_path / "log"))
    assert run_train(muon_flags(shards, tmp_path / "log", **change)) == 2
    assert said.format(tmp_path / "log", "--max_lr 0.01 --decay linear") in capsys.readouterr().err


@pytest.mark.parametrize("older", [True, False])
def test_a_run_of_an_older_version_resumes_bitwise_or_is_refused_for_its_order(shards, tmp_path, capsys, older):
    assert run_train(tiny_flags(shards, tmp_path / "unbroken", save_every=1)) == 0
    flags = tiny_flags(shards, tmp_path / "old", save_every=1)
    stop_after(3, flags)
    for path in (tmp_path / "old").glob("ckpt_*.pt"):
        state = torch.load(path)
        for name in ("optimizer", "decay", "init_std", "embedding_lr", "print_every", "dropout"):
            del state["TrainConfig"][name]
        if not older:
            state["TrainConfig"]["order"] = "hashed"
        torch.save(state, path)
    if older:
        assert run_train(flags) == 1
        assert "is an older version's, which shuffled in another way: give another" in capsys.readouterr().err
        return
    assert run_train(flags) == 0
    for key in ("model", "optimizer"):
        assert_same(newest(tmp_path / "old")[key], newest(tmp_path / "unbroken")[key])
