#!/usr/bin/env bash
# The first 25 minutes, at most, on an H100 or A100: does all of it work, is it right, how fast is it?
#
#     bash benchmarks/first_gpu_run.sh [FOLDER]       # a new folder for the results (first_gpu_run); needs no network
#
# A part that fails leaves the others be. summary.md in FOLDER is worth sending back, with the *.txt beside it.
set -u
cd "$(dirname "$0")/.."
out=${1:-first_gpu_run}
mkdir "$out" || exit 1
out=$(cd "$out" && pwd)
summary=$out/summary.md
python=$PWD/.venv/bin/python
[ -x "$python" ] || python=python
python=${PYTHON:-$python}
printf '| part | seconds | status |\n|---|---|---|\n' > "$summary"

part() { # NAME SECONDS COMMAND...: run it, its output into FOLDER/NAME.txt
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    echo "== $name: $*"
    timeout -k 30 "$limit" "$@" > "$out/$name.txt" 2>&1
    status=$?
    tail -n 4 "$out/$name.txt"
    echo "| $name | $((SECONDS - began)) | $status |" >> "$summary"
}

gpt2() { # NAME FLAGS...: a run of 124M on the demo's text, in place of this shell
    local name=$1
    shift
    exec "$python" train_gpt2.py --data_dir demo_data --out_dir "$out/$name" --warmup_steps 5 --val_tokens 1048576 \
        --eval_every 15 --sample_every 30 --save_every 15 --hellaswag_data "$out/rows.jsonl" --hellaswag_every 15 "$@"
}

stop_and_resume() { # SIGTERM after step 3, then the same command again to the end
    (gpt2 stopped --max_steps 12) & local run=$!
    until grep -q '"event": "train", "step": 3' "$out/stopped/log.jsonl" 2> /dev/null; do
        sleep 0.2
        kill -0 $run || return 1
    done
    kill -TERM $run
    wait $run || return 1
    gpt2 stopped --max_steps 12
}
export -f gpt2 stop_and_resume
export out python

for i in $(seq 200); do
    echo "{\"ctx\": \"Number $i is\", \"endings\": [\"$i.\", \"not $i.\", \"as large as $i.\", \"blue.\"], \"label\": \"$((i % 4))\"}"
done > "$out/rows.jsonl"
nvidia-smi > "$out/nvidia-smi.txt" 2>&1
"$python" -c "import torch; print(torch.__version__, torch.backends.cudnn.version())" >> "$out/nvidia-smi.txt" 2>&1

part data 60 "$python" fineweb.py --demo
part arithmetic 150 "$python" benchmarks/gpu_arithmetic.py
part demo 120 "$python" train_gpt2.py --demo --out_dir "$out/demo"
part gpt2_124m 200 bash -c "gpt2 run --max_steps 30"
part gpt2_124m_flash_attention 120 env TORCH_CUDNN_SDPA_DEPRIORITIZED=1 bash -c "gpt2 flash --max_steps 10"
part gpt2_124m_muon 120 bash -c "gpt2 muon --optimizer muon --max_steps 10"
part stop_and_resume 120 bash -c stop_and_resume
part speed 300 "$python" benchmarks/train_step.py gpu --steps 10
part speed_tried 300 "$python" benchmarks/train_step.py gpu_tried --steps 10 --sides 0 2 5

rm -f "$out"/*/ckpt_*.pt
{
    echo
    grep -hE "^\||attention:" "$out/arithmetic.txt" "$out/speed.txt" "$out/speed_tried.txt"
    echo
    grep -hE "micro-batches of|step +(15|30)[ /]|HellaSwag|GPT-2 with" "$out/gpt2_124m.txt"
} >> "$summary" 2> /dev/null
cat "$summary"
