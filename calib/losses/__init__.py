"""Losses as pure functions of tensors: no cache, no files, no state. Background is the last class."""
