"""What is done with fitted heads: measure, compare, choose, combine, calibrate, set thresholds."""
