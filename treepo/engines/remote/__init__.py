"""The engine over HTTP: it asks vLLM, SGLang or `treepo serve` for segments."""
