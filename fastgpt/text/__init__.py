"""Text -> ids -> files -> batches."""
