"""Proves by autograd which gradients a network reverses."""
