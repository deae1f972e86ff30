"""Does anything grow? 20,000 steps of a tiny model with every evaluation on, watched from outside.

    python benchmarks/soak.py                # about five minutes on two CPU cores
    python benchmarks/soak.py --steps 3000   # for a look

`python train_gpt2.py` runs in a process of its own: validation, HellaSwag on made-up rows, samples, the picture and a
checkpoint every 200 steps. Its resident memory and its open files are read from /proc (Linux) every 1,000 steps. Ends
with status 1 unless, at the end, the memory is within 5% of that after 1,000 steps, and the files are as many.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt2.py"
FLAGS = """--demo --data_dir data --out_dir log --block_size 32 --n_layer 1 --n_head 1 --n_embd 16 --warmup_steps 100
    --batch_tokens 256 --micro_batch 4 --val_tokens 320 --eval_every 200 --hellaswag_every 200 --sample_every 200
    --save_every 200 --hellaswag_data rows.jsonl --max_length 40 --device cpu""".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="at least 2,000")
    steps = max(2000, parser.parse_args().steps)
    rows = ({"ctx": f"{i} is", "endings": [f"{i + j}." for j in range(4)], "label": str(i % 4)} for i in range(20))
    found: list[tuple[int, float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        command = [sys.executable, str(SCRIPT), *FLAGS, "--max_steps", str(steps + 3)]
        # One thread: on so small a model more would only wait for each other.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        print("| after step | resident memory, MiB | open files |\n|---|---|---|")
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
            # Two steps later than asked for, so that nothing of the evaluations is still under way.
            for line in process.stdout:
                step = int(match[1]) if (match := re.match(r"step +(\d+)/", line)) else 0
                if step > 2 and step % 1000 == 2:
                    memory = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
                    found.append((step, int(memory[1]) / 1024, len(os.listdir(f"/proc/{process.pid}/fd"))))
                    print("| {:,} | {:.1f} | {} |".format(*found[-1]), flush=True)
        if process.returncode:
            sys.exit(f"the run ended with status {process.returncode}")
    (_, memory, files), (_, memory_now, files_now) = found[0], found[-1]
    print(f"memory: {memory_now / memory - 1:+.1%} since step 1,000; files: {files_now - files:+d}")
    if memory_now > 1.05 * memory or files_now != files:
        sys.exit("something grows")


if __name__ == "__main__":
    main()
