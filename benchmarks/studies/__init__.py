"""One-off measurements, one module each with ``arguments(parser)`` and ``run(args) -> figures``."""
