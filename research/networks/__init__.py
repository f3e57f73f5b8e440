"""What the table of backbones is made of: layers, weights, and how they are rebuilt."""
