"""One self-contained page about a split: verdict, data, plan, scores, pictures, and where every number comes from."""
