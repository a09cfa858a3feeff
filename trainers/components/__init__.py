"""What methods share: pure functions and small modules."""
