"""What `steerlm` does: one file a verb, one a task of `evaluate`. The steps of the method meet on files."""
