"""Calibration methods: one family per file. ``base.py`` has the protocols, ``fit.py`` the one training loop."""
