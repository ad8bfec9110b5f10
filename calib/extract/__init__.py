"""Running a frozen detector once and writing what its classifier sees: the feature cache."""
