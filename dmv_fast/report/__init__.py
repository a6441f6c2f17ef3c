"""One self-contained HTML page for an evaluation or a benchmark."""
