"""Metrics, evaluation of folders of label maps, statistics."""
