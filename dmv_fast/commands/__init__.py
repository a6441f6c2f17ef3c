"""The subcommands of `dmv-fast`, one module each: `add_arguments(parser)` and `run(args) -> int`."""

DTYPES = "auto, float32, bfloat16, bfloat16x3, float16, int16 (auto)"
"""What `--dtype` takes, as its help says it."""
