"""The trained networks: backbones, their weights, and the new head."""
