"""Exports in real clients: `GPT2_CLIENTS=DIR .venv/bin/pytest -m slow tests/test_clients.py`; else they are skipped.

DIR is filled from PyPI and npm, once, some gigabytes: virtual environments with transformers 4 and ctranslate2, the
source of llama-cpp-python, whose llama.cpp has the converter, and node-llama-cpp, which brings a built llama.cpp.
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import CPU

from support.tokens import tokenizer
from train_gpt2 import GPT, GPTConfig, SampleConfig, generate

CLIENTS = Path(os.environ.get("GPT2_CLIENTS", "."))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("GPT2_CLIENTS" not in os.environ, reason="GPT2_CLIENTS names no folder"),
]
PROMPTS = ["The sea", "It was the best of times, it was", "def main():\n    ", "1, 2, 3,"]
TEXTS = [
    "Hello, world",
    "  two  spaces ",
    "don't we'll I've",
    "tab\tline\n\n\nend",
    "naïve café 日本語 🎉",
    "1,024.50",
    " x" * 30,
]
LENGTH = 60

ASK_TRANSFORMERS = """
import json, sys
from transformers import AutoTokenizer, GPT2LMHeadModel, GPT2Tokenizer
folder, job = sys.argv[1], json.load(sys.stdin)
kinds = [GPT2Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder),
         AutoTokenizer.from_pretrained(folder, use_fast=False)]
ids = [[kind(text)["input_ids"] for text in job["texts"]] for kind in kinds]
model, out = GPT2LMHeadModel.from_pretrained(folder).eval(), []
batch = kinds[1](job["prompts"], return_tensors="pt", padding=True)
for row in model.generate(**batch, max_new_tokens=job["new"], do_sample=False)[:, batch["input_ids"].size(1):].tolist():
    out.append(row)
print(json.dumps({"ids": ids, "out": out}))
"""

ASK_CTRANSLATE2 = """
import json, sys
import ctranslate2
from transformers import AutoTokenizer
folder, job = sys.argv[1], json.load(sys.stdin)
ctranslate2.converters.TransformersConverter(folder).convert(folder + ".ct2", force=True)
encoding, model, out = AutoTokenizer.from_pretrained(folder), ctranslate2.Generator(folder + ".ct2"), []
for prompt in job["prompts"]:
    tokens = encoding.convert_ids_to_tokens(encoding(prompt)["input_ids"])
    found = model.generate_batch([tokens], max_length=job["new"], sampling_topk=1, include_prompt_in_result=False)
    out.append(found[0].sequences_ids[0])
print(json.dumps({"ids": [], "out": out}))
"""

ASK_LLAMA_CPP = """
import {getLlama} from "node-llama-cpp";
import fs from "fs";
const job = JSON.parse(fs.readFileSync(0));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 2, logLevel: "error"});
const model = await llama.loadModel({modelPath: process.argv[2]});
const ids = [job.texts.map(text => model.tokenize(text, false))], out = [];
for (const prompt of job.prompts) {
  const context = await model.createContext({contextSize: 128, flashAttention: false,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"});
  const row = [];
  for await (const token of context.getSequence().evaluate(model.tokenize(prompt, false), {temperature: 0})) {
    row.push(token);
    if (row.length == job.new) break;
  }
  out.push(row);
  await context.dispose();
}
console.log(JSON.stringify({ids, out}));
process.exit(0);
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A folder exported from a model whose greedy text varies, and that text as token ids."""
    model = GPT(GPTConfig(block_size=128, n_layer=2, n_head=2, n_embd=32), seed=1)
    model.init_weights(1, std=0.5)
    folder = tmp_path_factory.mktemp("clients") / "out"
    folder.mkdir()
    model.save_pretrained(folder)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer().encode(prompt)
        config = SampleConfig(num_samples=1, max_length=len(ids) + LENGTH, temperature=0)
        expected.append(generate(model, ids, config, 0, CPU)[0][len(ids) :])
    assert min(len(set(row)) for row in expected) > 10
    return folder, expected


def environment_with(name: str, *packages: str) -> str:
    """The Python of a virtual environment in CLIENTS with these packages, made if need be."""
    python = CLIENTS / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", CLIENTS / name], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={torch.__version__[:6]}", *packages], check=True)
    return str(python)


def ask(command: list, cwd=None) -> dict:
    job = json.dumps({"texts": TEXTS, "prompts": PROMPTS, "new": LENGTH})
    result = subprocess.run(command, input=job, capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def compare(found: dict, expected: list[list[int]]) -> None:
    wanted = [tokenizer().encode_ordinary(text) for text in TEXTS]
    assert all(ids == wanted for ids in found["ids"])
    for row, ours in zip(found["out"], expected, strict=True):
        assert len(ours) > 5
        assert row[: len(ours)] == ours


@pytest.mark.parametrize("version", ["4.45.2", "4.57.6"])
def test_transformers_4_reads_the_export(export, version):
    python = environment_with(f"transformers-{version}", f"transformers=={version}", "numpy<2.3")
    compare(ask([python, "-c", ASK_TRANSFORMERS, export[0]]), export[1])


def test_ctranslate2_reads_the_export(export):
    python = environment_with("ctranslate2", "ctranslate2==4.8.5", "transformers==4.57.6", "numpy<2.3")
    compare(ask([python, "-c", ASK_CTRANSLATE2, export[0]]), export[1])


def test_llama_cpp_reads_the_export(export, tmp_path):
    name = "llama_cpp_python-0.3.36"
    python = environment_with(
        "converter", "transformers==4.57.6", "numpy<2.3", "sentencepiece", "protobuf", "pyyaml", "requests"
    )
    if not (CLIENTS / name).exists():
        # Not by pip, which would build it to know its name.
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
        ]
        subprocess.run([*pip, "-d", CLIENTS, "llama-cpp-python==0.3.36"], check=True)
        with tarfile.open(CLIENTS / f"{name}.tar.gz") as archive:
            archive.extractall(CLIENTS, filter="data")
    if not (CLIENTS / "node" / "node_modules").exists():
        (CLIENTS / "node").mkdir(exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "node-llama-cpp@3.22.1"], cwd=CLIENTS / "node", check=True)
    source = CLIENTS / name / "vendor" / "llama.cpp"
    convert = [
        python,
        source / "convert_hf_to_gguf.py",
        export[0],
        "--outtype",
        "f32",
        "--outfile",
        tmp_path / "m.gguf",
    ]
    subprocess.run(convert, check=True, capture_output=True)
    (CLIENTS / "node" / "ask.mjs").write_text(ASK_LLAMA_CPP)
    compare(ask(["node", "ask.mjs", tmp_path / "m.gguf"], cwd=CLIENTS / "node"), export[1])
