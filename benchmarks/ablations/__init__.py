"""The paper's ablations on our data: `python -m benchmarks.ablations --help`, docs/ablations.md."""
