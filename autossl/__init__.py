"""autossl: self-configuring semi-supervised segmentation of medical images."""
