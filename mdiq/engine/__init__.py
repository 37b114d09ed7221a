"""The torch engine: Batches in, rows out. No sockets, no asyncio."""
