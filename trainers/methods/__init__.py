"""The semi-supervised methods, one file each, and the dict that names them."""
