"""The processes that send requests and record what came back."""
