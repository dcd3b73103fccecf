"""The Scale Down curve: what the same users gain on held-out text with each method, against the bytes each owns."""
