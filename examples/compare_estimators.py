"""The same tree under every estimator: who gets credit for a late mistake?"""

from rich.console import Console
from rich.table import Table

from treepo import GRPO, RLOO, DrGRPO, Forest, ScoredTree, Stop, Tree, TreePO

# One good beginning with a right and a wrong ending, and one bad beginning with two wrong endings.
tree = Tree([0], key="example")
good = tree.add(0, [1] * 8, [-0.5] * 8, seed=1)
bad = tree.add(0, [2] * 8, [-0.5] * 8, seed=2)
for parent in (good, good, bad, bad):
    tree.add(parent, [3] * 8, [-0.5] * 8, seed=len(tree) + 10, stop=Stop.EOS)
forest = Forest.of([ScoredTree("example", tree, [1.0, 0.0, 0.0, 0.0])])

table = Table("estimator", "good, right", "good, wrong", "bad, wrong", "bad, wrong")
for estimator in (TreePO(whiten=False), TreePO(whiten=False, size_weighted=True), GRPO(), DrGRPO(), RLOO()):
    name = estimator.kind + (" size-weighted" if getattr(estimator, "size_weighted", False) else "")
    table.add_row(name, *(f"{value:+.3f}" for value in estimator(forest)[:, 1]))
Console().print(table)
