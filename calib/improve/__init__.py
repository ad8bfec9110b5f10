"""From a trained detector to a better head in one call: ``calib improve``."""
