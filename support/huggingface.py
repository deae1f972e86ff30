"""GPT-2 weights and tokenizer, from and for `transformers`: dicts in, dicts out."""

import os
import re
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from support.cli import UserError, one_line, warn
from support.tokens import END_OF_TEXT, N_VOCAB, tokenizer

# Weights that `transformers` keeps as (in, out), nn.Linear as (out, in).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# What a configuration must share with GPT-2's, apart from the shape.
SAME = ("model_type", "activation_function", "layer_norm_epsilon", "n_inner", "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx", "tie_word_embeddings")  # fmt: skip


def read_gpt2(name_or_dir: str) -> tuple[dict[str, int], dict[str, Tensor], list[int]]:
    """A GPT-2 of the Hub, or a folder saved by `transformers`; UserError if it is none.

    Gives the shape by the names of GPTConfig, the weights in float32 by those of a checkpoint, and the ids of the
    tokens that may be predicted; the vocabulary is not padded. No code in the folder is run.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    is_name = re.fullmatch(r"(distil)?gpt2(-medium|-large|-xl)?|\w[\w.-]*/[\w.-]+", name_or_dir)
    on_hub = is_name and not os.path.exists(name_or_dir.split("/")[0])  # log/run is a folder where log is
    if not on_hub and not os.path.isfile(os.path.join(name_or_dir, "config.json")):
        what = f"no checkpoint in {name_or_dir}, nor what `transformers` saves (config.json, model.safetensors)"
        fix = "train first, or give --out_dir, --init_from or, after the demo, --demo"
        raise UserError(f"{what}, and it is no gpt2 of the Hub: {fix}")
    try:
        c = GPT2Config.from_pretrained(name_or_dir)
        if c.activation_function == "gelu_pytorch_tanh":  # the same by another name
            c.activation_function = "gelu_new"
        if c.n_inner == 4 * c.n_embd:  # which None stands for
            c.n_inner = None
        if c.vocab_size not in (N_VOCAB, 50304) and c.vocab_size > N_VOCAB:
            raise ValueError(f"it has {c.vocab_size} tokens, GPT-2 has {N_VOCAB}")
        for key in SAME:
            found, wanted = getattr(c, key), getattr(GPT2Config(), key)
            if found != wanted:
                raise ValueError(f"its {key} is {found!r}, GPT-2 has {wanted!r}")
        # eager: else config.json could name a kernel of attention to download and run.
        settings = {"dtype": torch.float32, "use_safetensors": True, "attn_implementation": "eager"}
        model, info = GPT2LMHeadModel.from_pretrained(name_or_dir, config=c, output_loading_info=True, **settings)
        lacking = [*info["missing_keys"], *info["mismatched_keys"]]
        if lacking:
            raise ValueError(f"it lacks {lacking[0]}, as GPT-2 has it")
        if not torch.equal(model.lm_head.weight, model.transformer.wte.weight):
            raise ValueError("its lm_head.weight is not its wte.weight, GPT-2 has one for both")
    except Exception as error:  # network, files and formats each have their own
        fix = "what is to be taken is as save_pretrained() writes it, model.safetensors and config.json"
        raise UserError(f"cannot take weights from {name_or_dir}: {one_line(error)}: {fix}") from None
    shape = {"block_size": c.n_positions, "vocab_size": c.vocab_size, "n_layer": c.n_layer,
             "n_head": c.n_head, "n_embd": c.n_embd}  # fmt: skip
    masked = set(model.generation_config.suppress_tokens or ())
    token_ids = [i for i in range(min(c.vocab_size, N_VOCAB)) if i not in masked]
    weights = {name: w.T if name.endswith(TRANSPOSED) else w for name, w in model.state_dict().items()}
    return shape, weights, token_ids


def write_gpt2(folder: Path, shape: dict[str, int], weights: dict[str, Tensor], token_ids: list[int]) -> None:
    """Fill a folder as `transformers` saves a GPT2LMHeadModel: weights, configuration, fast tokenizer.

    The arguments are what read_gpt2() gives, the vocabulary padded or not. Tokens that are not in token_ids become
    `suppress_tokens`, which holds for generate() only. Raises UserError for a model that is no GPT-2.
    """
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, logging

    logging.disable_progress_bar()
    ends = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT}
    config = GPT2Config(
        vocab_size=N_VOCAB, n_positions=shape["block_size"], n_embd=shape["n_embd"],
        n_layer=shape["n_layer"], n_head=shape["n_head"], resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, architectures=["GPT2LMHeadModel"], dtype="float32", **ends,
        n_ctx=shape["block_size"],  # for llama.cpp's converter
    )  # fmt: skip
    weights = {name: w.T if name.endswith(TRANSPOSED) else w for name, w in weights.items()}
    weights["transformer.wte.weight"] = weights["lm_head.weight"] = weights["lm_head.weight"][:N_VOCAB]  # tied
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    try:
        model.load_state_dict({name: w.cpu().contiguous() for name, w in weights.items()}, assign=True)
    except RuntimeError as error:
        raise UserError(f"cannot export, as this is no GPT-2 of `transformers`: {one_line(error)}") from None
    model.tie_weights()
    masked = sorted(set(range(N_VOCAB)).difference(token_ids))
    longest = shape["block_size"] if shape["block_size"] < 1024 else None  # a pipeline's own is 256 new tokens
    model.generation_config = GenerationConfig(
        pad_token_id=END_OF_TEXT, max_length=longest, suppress_tokens=masked or None, **ends
    )
    encoding = fast_tokenizer(model_max_length=shape["block_size"], pad_token="<|endoftext|>", padding_side="left")
    try:
        model.save_pretrained(folder)
        encoding.save_pretrained(folder)
        encoding.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, for transformers 4
    except Exception as error:  # for a full disk safetensors and tokenizers have their own
        raise UserError(f"cannot write the export: {one_line(error)}") from None
    if masked:
        warn(f"{len(masked):,} tokens are masked in generate() of `transformers` only: elsewhere this is a bad model")


def fast_tokenizer(**kwargs):
    """The GPT-2 encoding as a GPT2Tokenizer, which takes <|endoftext|> in a text for that token."""
    from transformers import GPT2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ranks = {tokenizer().decode_single_token_bytes(rank): rank for rank in range(END_OF_TEXT)}
    letters = bytes_to_unicode()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in ranks:
        # Encode the token's bytes until two parts are left: those are the two that its merge joins.
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(a + b, N_VOCAB) for a, b in pairwise(parts)]
            first = joined.index(min(joined))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append((names[parts[0]], names[parts[1]]))
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    return GPT2Tokenizer(vocab=vocabulary | {"<|endoftext|>": END_OF_TEXT}, merges=merges, **kwargs)
