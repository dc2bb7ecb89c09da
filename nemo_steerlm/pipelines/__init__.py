"""Drivers that run several steps in one job."""
