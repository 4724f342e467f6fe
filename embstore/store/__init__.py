"""The store's format on disk: versions, labels, releases, manifests, tensors. Needs no torch."""
