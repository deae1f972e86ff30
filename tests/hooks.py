"""train_gpt2.py with something that happens just before each training step: python tests/hooks.py NAME FLAGS...

A hook takes the number of the step and the model that is about to be trained.
"""

import hashlib
import inspect
import math
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial

import train_gpt2
from support.cli import UserError, run_script


@contextmanager
def before_each_step(hook):
    """Within it, hook(step, model) is called before each training step."""
    real = train_gpt2.train_step
    signature = inspect.signature(real)

    def step(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        hook(given["step"], given["model"])
        return real(*args, **kwargs)

    train_gpt2.train_step = step
    try:
        yield
    finally:
        train_gpt2.train_step = real


def fail_on_rank_1(step, model):
    if os.environ["RANK"] == "1":
        raise UserError("rank 1 fails here")


def nan_at_step_4_on_rank_1(step, model):
    if step == 4 and os.environ["RANK"] == "1":
        model.register_forward_hook(lambda module, inputs, loss: loss * math.nan)


def overflow_at_step_3_on_rank_1(step, model):
    def overflow(gradient):
        return gradient * math.inf if overflow.step == 3 else gradient

    if step == 1 and os.environ["RANK"] == "1":
        weight = model.module.transformer.ln_f.weight
        weight.register_hook(overflow)
        model.overflow = overflow
    if hasattr(model, "overflow"):
        model.overflow.step = step


def sigterm_at_step_3(step, model):
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)


def sigterm_while_step_2_is_measured(step, model):
    if step == 2:
        real = train_gpt2.evaluate

        def evaluate(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            return real(*args)

        train_gpt2.evaluate = evaluate


def hang_at_step_2(step, model):
    if step == 2:
        print("hangs", flush=True)
        end = time.monotonic() + 300
        while time.monotonic() < end:
            time.sleep(0.1)


def sigterm_in_a_long_operation_at_step_2(step, model):
    def work(rounds: int) -> float:
        began = time.monotonic()
        hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)  # no signal interrupts it
        return time.monotonic() - began

    if step == 2:
        rounds = int(100_000 * 3 / work(100_000))
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        while work(rounds) < 2:
            rounds *= 2


if __name__ == "__main__":
    with before_each_step(globals()[sys.argv[1]]):
        run_script(partial(train_gpt2.main, sys.argv[2:]), "train_gpt2.py")
