"""Grow one tree with a model in this process and turn its rewards into advantages."""

from treepo import Forest, LocalEngine, Sampler, SamplerSettings, ScoredTree, TreePO
from treepo.models import causal_lm
from treepo.tasks.program import ProgramTask

task = ProgramTask()  # or: causal_lm.load("FOLDER"), causal_lm.load_tokenizer("FOLDER") for any causal LM
tokenizer = task.tokenizer()
policy = causal_lm.create(causal_lm.Shape(), tokenizer, seed=0)

settings = SamplerSettings(width=8, segment_tokens=6, max_depth=6)
sampler = Sampler(LocalEngine(policy), settings, tokenizer.decode, causal_lm.stop_ids(policy, tokenizer))
problem = task.problems("train")[0]
(tree,) = sampler.sample([(problem.id, task.encode(tokenizer, problem))], seed=0)

rewards = [float(len(tree.response(leaf)) % 2) for leaf in tree.leaves()]  # any function of the leaf
advantage = TreePO(whiten=False)(Forest.of([ScoredTree(problem.id, tree, rewards)]))  # [L, D + 1]
print(f"{len(tree.leaves())} leaves, {tree.unique_tokens} tokens generated for {tree.flat_tokens}; {advantage[:, 1]}")
