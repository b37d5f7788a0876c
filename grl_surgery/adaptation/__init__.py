"""What a run that adapts needs besides surgery: where to cut, paired data, saving, validators."""
