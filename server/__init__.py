"""The rescoring service: Open Inference Protocol V2 over HTTP. Installed as ``calib.server``."""
