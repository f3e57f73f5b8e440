"""What a run tells: on the terminal, in files, in pictures and in TensorBoard."""
