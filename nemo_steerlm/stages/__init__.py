"""The steps of SteerLM, one file each; they meet on files and never import each other."""
