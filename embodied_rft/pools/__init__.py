"""Environments stepped together: the protocol, in this process, in workers, in chunks."""
