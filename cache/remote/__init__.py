"""Caches in object stores: S3, Google Cloud Storage, Azure, and memory for tests."""
