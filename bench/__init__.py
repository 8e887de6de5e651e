"""kvfold.bench: the command line `kvfold`, the benchmark runner, the tuner and the demo."""
