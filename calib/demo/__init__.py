"""The main job from end to end on rendered images: every head of ``heads.toml`` on one detector, one table."""
