"""Tools for a training run: where to cut, paired data, checkpoints, validators."""
