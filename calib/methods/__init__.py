"""One file per method: its settings, its fit and its search space; ``calib/registry.py`` has a line for each."""
