"""``python -m grl_surgery`` is ``grl-surgery``."""

from grl_surgery.cli.main import main

main()
