"""What is served: versions watched, verified, loaded, swapped and checked."""
