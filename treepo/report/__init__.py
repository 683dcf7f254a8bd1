"""What a person looks at: the progress of a run, its curves, trees drawn as text."""
