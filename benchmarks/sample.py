"""How fast generate() samples, beside `transformers` with its cache and a loop without one, in one run.

    python benchmarks/sample.py

Four samples go from 8 tokens to 256, on the GPU if there is one, and there under bfloat16 autocast, as --sample does;
--dtype float32 takes that away. The weights are random, in the shape of GPT-2 124M; each token is the likeliest one, so
that all sides must find the same text in float32; bfloat16 may end ties in other ways. tokens/s counts what is new in
all four. The prompt and the making of buffers are in the times.

- script: train_gpt2.generate(). Keys and values are kept, and all buffers are allocated once.
- transformers: GPT2LMHeadModel.generate() on the same weights, with SDPA and its cache, to the same length.
- loop: the usual loop, which runs the whole text again for each token, with logits for the last position only.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, which has a hellaswag.py

import argparse  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402

from benchmarks.hellaswag import make_model  # noqa: E402
from support.world import World, join_world  # noqa: E402
from train_gpt2 import GPT, SampleConfig, generate  # noqa: E402

PROMPT = list(range(1000, 9000, 1000))


@torch.no_grad()
def loop(model: GPT, rows: int, length: int) -> list[list[int]]:
    tokens = torch.tensor([PROMPT] * rows, device=model.lm_head.weight.device)
    while tokens.size(1) < length:
        logits = model.logits(model.hidden(tokens)[:, -1])  # (B, V)
        tokens = torch.cat([tokens, logits.argmax(1, keepdim=True)], dim=1)
    return tokens.tolist()


def compare(args: argparse.Namespace, world: World) -> None:
    rows, length, device, model = args.num_samples, args.max_length, world.device, make_model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa").to(device).eval()
    model.to(device)

    def script(length: int) -> list[list[int]]:
        config = SampleConfig(num_samples=rows, max_length=length, temperature=0.0)
        return generate(model, PROMPT, config, 0, world)

    def hugging_face(length: int) -> list[list[int]]:
        tokens = torch.tensor([PROMPT] * rows, device=device)
        return theirs.generate(tokens, max_length=length, do_sample=False).tolist()

    sides = {"script": script, "transformers": hugging_face, "loop": lambda length: loop(model, rows, length)}
    rounds = {"script": args.rounds, "transformers": args.rounds, "loop": args.loop_rounds}
    for side in sides.values():
        side(len(PROMPT) + 4)
    seconds, texts = {name: [] for name in sides}, {}
    for number in range(max(rounds.values())):
        for name in sorted(sides, reverse=number % 2 == 1):
            if number < rounds[name]:
                began = time.perf_counter()
                with world.autocast():
                    texts[name] = sides[name](length)
                seconds[name].append(time.perf_counter() - began)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {where}, {world.dtype}")
    print("| side | rounds | seconds, median (least to most) | tokens/s | time / script's | same text |")
    print("|---|---|---|---|---|---|")
    new = rows * (length - len(PROMPT))
    for name, values in seconds.items():
        if values:
            median, base = statistics.median(values), statistics.median(seconds["script"])
            same = "yes" if texts[name] == texts["script"] and len(texts[name][0]) == length else "NO"
            print(
                f"| {name} | {len(values)} | {median:.2f} ({min(values):.2f} to {max(values):.2f}) "
                f"| {new / median:.1f} | {median / base:.2f} | {same} |"
            )
    print(f"the text has {len(set(texts['script'][0]))} different tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = {"type": int, "metavar": "N"}
    parser.add_argument("--num_samples", choices=range(1, 1000), default=4, **whole)
    parser.add_argument("--max_length", choices=range(13, 1025), default=256, **whole)
    parser.add_argument("--rounds", choices=range(1, 1000), default=3, **whole)
    parser.add_argument("--loop_rounds", default=1, help="of the loop, which takes minutes on a CPU", **whole)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    args = parser.parse_args()
    with join_world(args.device, args.dtype) as world:
        compare(args, world)


if __name__ == "__main__":
    main()
