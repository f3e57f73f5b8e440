"""What is in a data set, before anything is trained on it."""
