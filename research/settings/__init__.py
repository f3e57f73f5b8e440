"""What a user can set: flags, their defaults, their ranges."""
