"""How fast this is beside what one would use instead; `python -m benchmarks`, or `make bench`."""
