"""What a load test is told to do: scenario files, options, targets."""
