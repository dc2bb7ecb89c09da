"""Measures how well a regressor scores and how well a policy steers, and shows it (numpy, matplotlib)."""
