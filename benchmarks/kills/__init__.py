"""Parts of the kill campaign."""
