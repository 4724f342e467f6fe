"""The offline trainer: events in, one release of compressed tables out.

    events (Parquet, CSV) -> rows by frequency -> factorisation -> fit -> evaluate -> store.publish_release

`run.train` tells that story from top to bottom; every other file here is one of its steps.
"""
