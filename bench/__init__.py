"""kvfold.bench: cases to test and time, the demo, the microbenchmark runner and the command line."""
