"""Losses, schedules of the coefficient, and metrics for a training loop."""
