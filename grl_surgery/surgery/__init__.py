"""Cuts a network at points, and puts reversals and heads there."""
