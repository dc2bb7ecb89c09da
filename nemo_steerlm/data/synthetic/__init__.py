"""A small English dialogue world whose attributes follow known rules: prompts, responses, oracle and annotators."""
