"""The input pipeline, from image files to batches."""
