"""Datasets of other layouts, turned into raw datasets."""
