"""The networks that are trained: backbones, their weights, the new head."""
