"""Terminal chat: conversations kept in files, replies streamed, slash commands."""
