"""From a trained module, a state dict, an array or a file to a published version, and back to a table."""
