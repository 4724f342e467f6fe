"""The highest rate that keeps an SLO."""
