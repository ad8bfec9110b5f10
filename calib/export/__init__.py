"""Heads leave calib: in a detector's checkpoint, in a live detector, as ONNX, torch.export, TorchScript, for Triton.

Every export is read back from the disk and compared with its head on rows of a cache before it gets its name.
"""
