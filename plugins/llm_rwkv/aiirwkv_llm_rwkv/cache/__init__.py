"""What a model remembers of the texts it has read, kept in memory and on disk."""
