"""Reads the forward of a module into a graph, and refuses where the graph would not be the forward."""
