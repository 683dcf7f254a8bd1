"""Causal language models of transformers: loading, adapters, and attention under a plan."""
