"""Programs that a study runs in a process of their own."""
