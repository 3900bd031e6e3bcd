"""One integer seed from everything that a random draw depends on."""

import hashlib


def seed_from(run_seed: int, purpose: str, *place: int) -> int:
    """A 63-bit seed that is a pure function of (run seed, purpose, place): the same on every machine and in every process.

    run_seed: the run's own seed, any integer. purpose: what is drawn ("order", "view", "step", ...), so that two purposes
    at the same place stay independent. place: where it is drawn, such as (epoch, index, view) or (update, rank).
    Returns: an integer in [0, 2**63).
    """
    key = repr((int(run_seed), purpose, *(int(number) for number in place)))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1
