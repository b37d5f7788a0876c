"""Writes spliced networks to files and reads them back."""
