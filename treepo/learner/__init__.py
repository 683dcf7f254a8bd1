"""The learner: scored trees in, optimizer steps out. It knows no configuration, no folder and no engine."""
