"""Large pictures in tiles: data sets cut into them, and detections of tiles put together again."""
