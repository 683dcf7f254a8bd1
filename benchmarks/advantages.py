"""Seconds to turn rewards into whitened advantages: 8,192 leaves in trees of depth 14.

    python -m benchmarks.advantages [--quick] [--out FILE]

`forest` is the part of these seconds that turns the trees into arrays (`Forest.of`). Packing uses the same arrays.
"""

from __future__ import annotations

import statistics
import time
from random import Random

from benchmarks import report
from treepo.advantages import GRPO, RLOO, SPO, Estimator, TreeGRPO, TreePO, TreePOSegment, TreeRL
from treepo.forest import Forest
from treepo.tree import ROOT, ScoredTree, Stop, Tree

WIDTH, DEPTH, SEGMENT = 16, 14, 8


def scored_tree(seed: int) -> ScoredTree:
    """Doubling from the root until 16 paths, all of them 14 segments deep; random 0 / 1 rewards."""
    rng = Random(seed)
    grown = Tree([1] * 32)
    active = [ROOT]
    for level in range(DEPTH):
        children = 2 if len(active) < WIDTH else 1
        stop = Stop.EOS if level == DEPTH - 1 else None
        active = [
            grown.add(node, [1] * SEGMENT, [0.0] * SEGMENT, seed=0, stop=stop)
            for node in active
            for _ in range(children)
        ]
    return ScoredTree(str(seed), grown, [float(rng.random() < 0.5) for _ in active])


def main() -> None:
    args = report.arguments(__doc__ or "", repeats=None)
    trees = [scored_tree(seed) for seed in range(128 if args.quick else 512)]
    estimators: dict[str, Estimator] = {
        "treepo": TreePO(),
        "treepo size_weighted reject fork": TreePO(size_weighted=True, reject_flat_groups=True, levels="fork"),
        "segment": TreePOSegment(eta=0.9),
        "spo": SPO(scale="values"),
        "treerl": TreeRL(),
        "tree_grpo": TreeGRPO(),
        "grpo": GRPO(),
        "rloo": RLOO(),
    }
    results = []
    for name, estimator in estimators.items():
        laying, whole = [], []
        for _ in range(5 if args.quick else 15):
            start = time.process_time()
            forest = Forest.of(trees)
            laid = time.process_time()
            estimator(forest)
            laying.append(laid - start)
            whole.append(time.process_time() - start)
        results.append(
            {
                "estimator": name,
                "leaves": len(forest.leaf),
                "depth": DEPTH,
                "seconds": statistics.median(whole),
                "forest": statistics.median(laying),
            }
        )
    report.finish("advantages", results, args)


if __name__ == "__main__":
    main()
