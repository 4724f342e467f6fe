"""From ids to vectors: on the event loop where that is quick, in a thread or on a device where it is not."""
