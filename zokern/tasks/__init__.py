"""What tasks are, apart from how a model is tuned for them: metrics by name, presets, and the benchmarks' own files."""
