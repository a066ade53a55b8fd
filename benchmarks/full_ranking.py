"""Time and memory of ranking every item for every user: 10,000 users x 50,000 items by default, one thread.

    python benchmarks/full_ranking.py [--users 10000] [--items 50000] [--dim 64]

Scores are products of random vectors; 5 wanted and 20 seen items a user; all figures of `recsys` at 10 and 20. The
whole table of scores would take 4 bytes x users x items; what is held is a block of users.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch

from attn_recsys.items import metrics
from attn_recsys.items.baselines import evaluate
from attn_recsys.items.data import Pairs, UserSet
from attn_recsys.items.options import ItemsTaskConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("users", 10_000), ("items", 50_000), ("dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)

    def pairs(each: int) -> Pairs:
        owner = np.repeat(np.arange(args.users), each)
        return Pairs(owner, rng.integers(0, args.items, len(owner)), args.users, args.items)

    train, wanted = pairs(20), pairs(5)
    both = np.isin(wanted.owner * args.items + wanted.number, train.owner * args.items + train.number)
    wanted = Pairs(wanted.owner[~both], wanted.number[~both], args.users, args.items)
    users = UserSet(wanted, train, train, everything=train.joined(wanted))
    left, right = torch.randn(args.users, args.dim), torch.randn(args.items, args.dim)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, cpu = time.perf_counter(), time.process_time()
    found = evaluate(lambda chosen: (left[torch.from_numpy(chosen)] @ right.T).numpy(), users, ItemsTaskConfig())
    figures = metrics.figures(found, (10, 20), groups=4, intervals=True)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    whole = 4 * args.users * args.items / 2**20
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{len(users):,} users x {args.items:,} items: {seconds:.1f} s ({cpu:.1f} CPU-s), AUC {figures['auc']:.4f}")
    print(f"memory above the start: {more:.0f} MiB; the whole table would be {whole:.0f} MiB")


if __name__ == "__main__":
    main()
