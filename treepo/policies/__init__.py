"""The three decisions that shape a tree. Each is a frozen model whose fields are its settings and whose call decides.

Randomness comes only from the generator that the sampler hands in, which is keyed by the place in the tree.
"""
