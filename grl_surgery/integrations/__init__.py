"""Trainers and loggers of other libraries: one module for each, which imports its library and nothing else.

None of them is imported by grl_surgery itself.
"""
