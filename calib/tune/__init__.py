"""Search over methods and settings on a tune split, and the choice of a head."""
