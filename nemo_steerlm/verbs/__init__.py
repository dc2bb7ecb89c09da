"""The verbs of `steerlm`: one file each, and one for each task of `evaluate`. The verbs exchange data as files."""
