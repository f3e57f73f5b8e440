"""Hosts that train together: how they meet, agree and end."""
