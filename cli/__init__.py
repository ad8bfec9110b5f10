"""The command line: parses, calls the library, prints. Installed as ``calib.cli``."""
