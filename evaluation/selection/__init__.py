"""Which of the trained runs, or which two of them together, become the final model."""
