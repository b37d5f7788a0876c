"""What exporting.py writes and reads: one format or one check a file."""
