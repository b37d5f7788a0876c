"""Layers: the reversal, domain heads and the pools in front of them."""
