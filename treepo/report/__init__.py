"""Output for people: the progress of a run, its curves, reports of studies, and trees drawn as text."""
