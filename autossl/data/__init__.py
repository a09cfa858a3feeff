"""What lies on disk: workspace, raw datasets, images, labels, splits, runs."""
