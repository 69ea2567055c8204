"""What a document goes through: one module a stage, each with a pure function on one text."""
