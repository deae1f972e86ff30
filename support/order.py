"""Which sequences a step reads: how many, on a ramp too, and in which order."""

from functools import lru_cache
from itertools import accumulate

import numpy as np

ROUNDS = 6


@lru_cache(maxsize=1)
def ramp_totals(config) -> list[int]:
    """Tokens in the first 0, 1, 2, ... batch_ramp_steps updates together."""
    steps, unit, full = config.batch_ramp_steps, config.batch_ramp_from, config.batch_tokens
    batches = []
    for done in range(steps):
        # Linear from unit to full, rounded to a multiple of unit, in exact integers.
        multiple = 1 + (2 * (full - unit) * done + steps * unit) // (2 * steps * unit)
        batches.append(min(multiple * unit, full))
    return [0, *accumulate(batches)]


def tokens_before(step: int, config) -> int:
    """Tokens in all updates before update `step`, counted from 1."""
    on_ramp = min(step - 1, config.batch_ramp_steps)
    return ramp_totals(config)[on_ramp] + (step - 1 - on_ramp) * config.batch_tokens


def tokens_of(step: int, config) -> int:
    """Tokens in the batch of update `step`, counted from 1."""
    return tokens_before(step + 1, config) - tokens_before(step, config)


def mixed(x: np.ndarray) -> np.ndarray:
    """A hash of each uint64: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hashed_order(places: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Elements `places` (int64) of a permutation of 0 to n - 1, which seed and epoch choose.

    Computed place by place, so that a corpus may be of any size. A Feistel network permutes the numbers below a
    power of four, at least 64, which but for small n is at most 4 n. A result that is not below n is sent through
    again until it is, which permutes the numbers below n.
    """
    keys = np.random.SeedSequence((seed, epoch)).generate_state(ROUNDS, np.uint64)  # the same in every NumPy
    half = np.uint64(max(3, ((n - 1).bit_length() + 1) // 2))  # with fewer bits some orders are rare
    low = (np.uint64(1) << half) - np.uint64(1)
    found = places.astype(np.uint64)
    todo = np.arange(len(found))
    while len(todo):
        left, right = found[todo] >> half, found[todo] & low
        for key in keys:
            # Whatever the hash is, this can be undone: one half changes, by what the other says.
            left, right = right, left ^ (mixed(right ^ key) & low)
        found[todo] = (left << half) | right
        todo = todo[found[todo] >= n]
    return found.astype(np.int64)


def sequences_at(places: range, n: int, seed: int) -> list[int]:
    """Which of n sequences stand at these places of the epochs end to end, each shuffled anew."""
    found: list[int] = []
    while places:
        epoch, first = divmod(places[0], n)
        here, places = np.array(places[: n - first]) % n, places[n - first :]
        found += hashed_order(here, n, seed, epoch).tolist()
    return found
