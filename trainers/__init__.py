"""What a method computes (base, methods) and when it runs (loop, batches)."""
