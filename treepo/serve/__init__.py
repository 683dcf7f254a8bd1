"""A small inference server over the local engine: `treepo serve`. It speaks as vLLM and SGLang do, in token ids."""
