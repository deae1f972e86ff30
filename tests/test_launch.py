"""However it is launched, wherever its output goes, whoever asks it to stop."""

import errno
import io
import os
import pty
import signal
import socket
import subprocess
import sys
import threading

import pytest
from conftest import (
    ROOT,
    before_each_step,
    losses,
    newest,
    run_script,
    run_train,
    start_script,
    tiny_flags,
    wait_for,
)

import train_gpt2
from support import checkpoint
from support.log import read_log

LONG = {"max_steps": 2000, "warmup_steps": 2, "eval_every": 0, "save_every": 2000}


def training(folder) -> bool:
    return "train" in read_log(folder / "log.jsonl")


# ---------------------------------------------------------------- a console that is gone


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_pipe_whose_reader_dies_ends_no_run_and_costs_no_checkpoint(shards, tmp_path, ranks):
    out = tmp_path / "log"
    process = start_script(["train_gpt2.py", *tiny_flags(shards, out, **LONG)], ranks=ranks)
    wait_for(lambda: training(out), process)
    process.stdout.close()  # as tee is, by the Ctrl-C that the run gets, too
    process.stderr.close()
    last = max(losses(out))
    wait_for(lambda: max(losses(out)) > last + 3, process)
    os.kill(process.pid, signal.SIGINT)
    status = process.wait(60)
    assert newest(out)["step"] == max(losses(out)) < 2000
    assert (status == 0) == (ranks == 1)  # torchrun has a status of its own for signals


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["| head -n 1", ">&-", ">&- 2>&-", ">/dev/full"])
def test_a_closed_or_full_output_ends_no_run(shards, tmp_path, closed):
    flags = tiny_flags(shards, tmp_path / "log", mask_unseen=True)  # which shows a bar
    command = " ".join([sys.executable, str(ROOT / "train_gpt2.py"), *flags])
    result = subprocess.run(["bash", "-c", f"{command} {closed}"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert result.stderr == ""
    assert newest(tmp_path / "log")["step"] == 6


@pytest.mark.slow
def test_a_closed_terminal_ends_a_run_with_a_checkpoint(shards, tmp_path):
    terminal, end = pty.openpty()
    argv = [sys.executable, ROOT / "train_gpt2.py", *tiny_flags(shards, tmp_path / "log", **LONG)]
    process = subprocess.Popen(argv, stdin=end, stdout=end, stderr=end, start_new_session=True)
    os.close(end)
    try:
        wait_for(lambda: training(tmp_path / "log"), process)
        os.close(terminal)
        os.kill(process.pid, signal.SIGHUP)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert newest(tmp_path / "log")["step"] == max(losses(tmp_path / "log")) < 2000


# ---------------------------------------------------------------- signals


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_a_hangup_and_slurms_signal_save_like_sigterm(shards, tmp_path, name):
    process = start_script(["train_gpt2.py", *tiny_flags(shards, tmp_path / "log", **LONG)])
    wait_for(lambda: training(tmp_path / "log"), process)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert f"stopped after step {newest(tmp_path / 'log')['step']}, as asked" in out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_torchrun_hands_on_a_hangup_and_slurms_signal(shards, tmp_path, name):
    torchrun = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]  # else all but the last
    flags = ["train_gpt2.py", *tiny_flags(shards, tmp_path / "log", **LONG)]
    process = start_script(flags, ranks=2, torchrun=torchrun)
    wait_for(lambda: training(tmp_path / "log"), process)
    process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=60)
    step = newest(tmp_path / "log")["step"]
    assert step == max(losses(tmp_path / "log")) < 2000
    assert f"stopped after step {step}, as asked" in out


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_in_the_first_evaluation_ends_the_run_at_once(shards, tmp_path, number):
    hook = (
        "import sys, time, train_gpt2; train_gpt2.evaluate = lambda *args: print('hangs', flush=True) or time.sleep(60)"
    )
    flags = tiny_flags(shards, tmp_path / "log", **LONG | {"eval_every": 1})
    program = (
        f"{hook}; from support.cli import run_script; run_script(lambda: train_gpt2.main({flags!r}), 'train_gpt2.py')"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, stdout=-1, stderr=-1)
    wait_for(lambda: "hangs" in process.stdout.readline(), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert "Traceback" not in err
    assert err == "train_gpt2.py: interrupted\n"
    assert process.returncode == 130


@pytest.mark.slow
def test_a_hangup_that_is_ignored_stays_ignored(shards, tmp_path):
    flags = ["train_gpt2.py", *tiny_flags(shards, tmp_path / "log", **LONG | {"max_steps": 300})]
    process = start_script(flags, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))  # as nohup does
    wait_for(lambda: training(tmp_path / "log"), process)
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=120)[1] == ""
    assert newest(tmp_path / "log")["step"] == 300


# ---------------------------------------------------------------- one process, several runs


def test_main_runs_again_in_a_process_in_which_it_was_interrupted(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as a notebook's, which lacks reconfigure()
    flags = tiny_flags(shards, tmp_path / "log", save_every=1)

    def interrupt(step, model):
        if step == 3:
            raise KeyboardInterrupt

    with before_each_step(interrupt), pytest.raises(KeyboardInterrupt) as kept:
        train_gpt2.main(flags)
    train_gpt2.main(flags)  # beside the traceback, which a notebook keeps
    assert kept.tb is not None
    assert list(losses(tmp_path / "log")) == [1, 2, 3, 4, 5, 6]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert handlers == [signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL]


def test_an_event_loop_hears_its_signals_again_after_a_run(shards, tmp_path):
    receiver, sender = socket.socketpair()
    with receiver, sender:
        sender.setblocking(False)
        before = signal.set_wakeup_fd(sender.fileno())
        try:
            assert run_train(tiny_flags(shards, tmp_path / "log")) == 0
            assert signal.set_wakeup_fd(before) == sender.fileno()
        finally:
            signal.set_wakeup_fd(before)


def test_main_runs_in_a_thread_where_no_signal_is_heard(shards, tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(run_train(tiny_flags(shards, tmp_path / "log"))))
    thread.start()
    thread.join()
    assert found == [0]


@pytest.mark.slow
def test_ipythons_run_command_goes_on_after_the_script(shards, tmp_path):
    program = (
        "import runpy, sys\n"
        "sys.modules['IPython'] = sys\n"
        f"sys.argv[1:] = {tiny_flags(shards, tmp_path / 'log', max_steps=0, warmup_steps=0)!r}\n"
        "try:\n"
        "    runpy.run_path('train_gpt2.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print('ended with', end.code)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "ended with 0", result.stderr


# ---------------------------------------------------------------- launchers


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "two"}, "'two'): unset it, or use torchrun"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun has started 2 runs that know nothing of each other: see assets/slurm.sh"),
    ],
)
def test_what_no_launcher_of_ours_sets_ends_in_one_line(shards, tmp_path, monkeypatch, capsys, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_train(tiny_flags(shards, tmp_path / "log")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "log").exists()


@pytest.mark.slow
def test_an_empty_rank_is_no_rank_and_a_tilde_is_the_home_folder(shards, tmp_path):
    env = {"LOCAL_RANK": "", "RANK": "", "HOME": str(tmp_path)}
    flags = tiny_flags(shards, tmp_path / "log", max_steps=1, warmup_steps=0)
    result = run_script(["train_gpt2.py", *flags, "--out_dir=~/x"], env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in checkpoint.find(tmp_path / "x")] == ["ckpt_000001.pt"]
    assert not (tmp_path / "~").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_gpt2.py", "fineweb.py", "hellaswag.py"])
def test_a_safe_path_is_no_obstacle(tmp_path, script):
    result = run_script([script, "--help"], env={"PYTHONSAFEPATH": "1", "PYTHONPATH": ""}, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(shards, tmp_path, monkeypatch, capsys, number):
    def flock(file, how):
        raise OSError(number, "no locks here")

    monkeypatch.setattr("fcntl.flock", flock)
    assert run_train(tiny_flags(shards, tmp_path / "log", max_steps=1, warmup_steps=0)) == 0
    assert f"warning: no lock keeps other runs out of {tmp_path / 'log'}: " in capsys.readouterr().err


@pytest.mark.parametrize("script", ["train_gpt2", "fineweb", "hellaswag"])
def test_an_older_python_is_told_so_in_one_line_before_all_else(script):
    program = f"import sys; sys.version_info = (3, 10, 1); sys.modules['numpy'] = None; import {script}"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("Python 3.11 or later is needed, and this is 3.")
    assert result.stderr.count("\n") == 1
