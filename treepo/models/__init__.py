"""Causal language models of transformers: loading, adapters, and the attention seam that plans go through."""
