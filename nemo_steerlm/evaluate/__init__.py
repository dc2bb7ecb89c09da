"""Measures how well a regressor predicts and how well a policy steers (numpy)."""
