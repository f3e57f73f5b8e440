"""What a checkpoint is worth: figures, how sure they are, pictures, comparisons."""
