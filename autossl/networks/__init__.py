"""Networks from plans, feature taps, and what a trained model predicts with."""
