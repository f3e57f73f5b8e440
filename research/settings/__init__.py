"""The settings of each program: flags, defaults and ranges."""
