"""Data that the product makes itself: the procedural long-tailed set and the small detector trained on it."""
