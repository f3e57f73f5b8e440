"""Where photos come from, how their files are read, and how they are changed by chance."""
