"""What is at a path, read without torch: layouts, families, configuration files and tensor headers."""
