"""Scripts that print ratios against peers and bounds. They assert nothing: `python -m benchmarks.step_time`."""
