"""Measurements of distsign against its rivals, one file a question; README.md has the commands."""
