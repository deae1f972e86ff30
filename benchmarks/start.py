"""How long it takes from the command to the end of the first training step, compiled code in the cache or not.

    python benchmarks/start.py

Each line is `python train_gpt2.py` in a new process, with one step of 2,048 tokens and nothing evaluated (on a GPU, ask
for 524,288 with the flags). "Cold" begins with an empty folder for compiled code, "warm" finds what the cold one left.
The files themselves are in the operating system's cache, and the demo corpus is there already. The time of the step, as
the script measures it, is beside the whole.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt2.py"
QUIET = "--demo --warmup_steps 0 --max_steps 1 --eval_every 0 --sample_every 0 --save_every 0".split()
SHAPE_124M = "--n_layer 12 --n_head 12 --n_embd 768 --block_size 1024 --no-mask_unseen --compile".split()


def run(flags: list[str], folder: str) -> tuple[float, float | None]:
    """Seconds until the first step's line, or the end if there is none, and those of the step itself."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
    command = [sys.executable, str(SCRIPT), *flags]
    began, result = time.perf_counter(), None
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if found := re.search(r"^step +1/.* tokens in (\d+) ms", line):
                result = time.perf_counter() - began, int(found[1]) / 1000
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return result or (time.perf_counter() - began, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, choices=range(1, 100), metavar="N", default=3, help="of each line but the cold ones"
    )
    parser.add_argument("--batch_124m", type=int, default=2048, help="tokens of the 124M step; 524288 on a GPU")
    parser.add_argument("--micro_124m", type=int, default=2, help="its sequences at a time; 64 on a large GPU")
    args = parser.parse_args()
    shape = [*SHAPE_124M, "--batch_tokens", str(args.batch_124m), "--micro_batch", str(args.micro_124m)]
    lines = {
        "--help": ["--help"],
        "demo": QUIET,
        "demo, compiled": [*QUIET, "--compile"],
        "124M, compiled": QUIET + shape,
    }
    print("| command | code cache | seconds to the end of the first step, median (least to most) | of these the step |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        run(QUIET, folder)  # writes the demo corpus
        for name, flags in lines.items():
            caches = {"cold": 1, "warm": args.rounds} if "compiled" in name else {"": args.rounds}
            for cache, rounds in caches.items():
                # Without a checkpoint, each run starts anew.
                seconds, steps = zip(*(run(flags, folder) for _ in range(rounds)), strict=True)
                step = f"{statistics.median(steps):.2f}" if None not in steps else ""
                span = f"{min(seconds):.2f} to {max(seconds):.2f}"
                print(f"| {name} | {cache} | {statistics.median(seconds):.2f} ({span}) | {step} |", flush=True)


if __name__ == "__main__":
    main()
