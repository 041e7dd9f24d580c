"""The order of an epoch of more samples than one would permute in memory: a keyed permutation.

A Feistel network of the bits of a place, as ciphers have it (Black and Rogaway, "Ciphers with arbitrary finite
domains", 2002): a bijection of [0, 2^m), which is repeated until the result is below n ("cycle walking").
"""

import numpy as np

ROUNDS = 8


class KeyedOrder:
    """A permutation of range(n) that takes no memory: `order[places]` are those of int64 places, in any order."""

    def __init__(self, n: int, keys: np.random.Generator):
        bits = max(2, (n - 1).bit_length())
        self.n, self.right, self.left = n, np.uint64(bits // 2), np.uint64(bits - bits // 2)
        self.keys = keys.integers(2**64, size=ROUNDS, dtype=np.uint64)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        found = self.mixed(places.astype(np.uint64))
        while (beyond := np.flatnonzero(found >= self.n)).size:
            found[beyond] = self.mixed(found[beyond])
        return found.astype(np.int64)

    def mixed(self, x: np.ndarray) -> np.ndarray:
        """A bijection of [0, 2^m): each half in turn is changed by what a hash makes of the other."""
        left, right = x >> self.right, x & ((np.uint64(1) << self.right) - np.uint64(1))
        for number, key in enumerate(self.keys):
            if number % 2:
                right ^= hashed(left, key, self.right)
            else:
                left ^= hashed(right, key, self.left)
        return left << self.right | right


def hashed(x: np.ndarray, key: np.uint64, bits: np.uint64) -> np.ndarray:
    """So many bits of SplitMix64's finaliser (Steele, Lea and Flood 2014) of x and a key."""
    x = (x ^ key) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> (np.uint64(64) - bits)
