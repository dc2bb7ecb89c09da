"""Jobs of a real SLURM, whose nodes are daemons on this machine."""
