"""kvfold.bench: cases, the demo, the microbenchmark runner and the command line."""
