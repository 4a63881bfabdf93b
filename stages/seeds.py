"""Random numbers from (seed, purpose, position), never from a worker's state.

Every draw in the project uses these, so that a shard remade by another worker after a crash has the same bytes.
"""

import zlib

import numpy as np


def generator(seed: int, purpose: str, position: int = 0) -> np.random.Generator:
    """A numpy generator for one purpose and one position (a sample's index, an epoch).

    Streams do not overlap: seed and purpose form the key of a counter-based generator (Philox), and the position is
    the high word of its counter, which leaves 2**192 draws per position.
    """
    key = np.array([seed, zlib.crc32(purpose.encode())], dtype=np.uint64)
    counter = np.array([0, 0, 0, position], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def coins(seed: int, purpose: str, position_N: np.ndarray) -> np.ndarray:
    """A fair coin for each of many positions at once: the top bit of SplitMix64 (Steele et al. 2014).

    It is the same whoever asks, and beside which other positions.
    """
    z = position_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(torch_seed(seed, purpose))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray((z ^ (z >> np.uint64(31))) >> np.uint64(63) == 1)


def torch_seed(seed: int, purpose: str, position: int = 0) -> int:
    """A 63-bit seed for ``torch.Generator`` or ``torch.manual_seed``, drawn from `generator`."""
    return int(generator(seed, purpose, position).integers(0, 2**63 - 1))
