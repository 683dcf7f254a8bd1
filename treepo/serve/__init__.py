"""A small inference server over the local engine: `treepo serve`. It speaks the protocols of vLLM and SGLang."""
