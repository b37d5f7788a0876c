"""Copies and contexts that keep the caller's network, tensors and random state as they were."""
