"""The subcommands of `dmv-fast`, one module each: `add_arguments(parser)` and `run(args) -> int`."""
