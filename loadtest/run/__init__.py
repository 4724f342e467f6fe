"""One run: workers started, merged, watched, calibrated."""
