"""The command line: absl flags generated from the config classes, and turned back into them."""
