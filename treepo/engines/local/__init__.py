"""The engine in this process: it decodes many branches of many trees on the model that is trained."""
