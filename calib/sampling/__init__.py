"""Which rows a training step sees. Every sampler computes step i from its seed and i alone, so that an interrupted
training goes on exactly where it stopped."""

from calib.sampling.step import Sampler, Step

__all__ = ["Sampler", "Step"]
