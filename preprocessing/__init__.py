"""Crop, normalize, resample, store: pure functions and one preprocessor."""
