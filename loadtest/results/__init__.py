"""What a run measured: histograms, summaries, validity, comparisons, conditions."""
