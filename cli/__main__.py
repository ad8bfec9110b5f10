"""``python -m calib.cli``."""

from .main import app

app()
