"""One thread that works on all requests at once, and how tokens are chosen and shown."""
