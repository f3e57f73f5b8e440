"""Photos in a folder or an archive: which are used, their labels, and their splits."""
