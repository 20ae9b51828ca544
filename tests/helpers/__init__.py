"""What several files of tests share; benchmarks use some of it too."""
