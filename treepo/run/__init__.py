"""A training run: configuration, the objects made from it, the training loop, checkpoints and the run's folder."""
