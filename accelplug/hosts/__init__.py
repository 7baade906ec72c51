"""Hosts: getting in and out of a library."""
